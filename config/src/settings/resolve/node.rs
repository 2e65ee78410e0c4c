//! The settings `node`, and the settings that a node daemon refuses.

use std::net::IpAddr;
use std::path::PathBuf;

use crate::error::Reason;
use crate::pod::dns::{MAX_NAME_SERVERS, is_local_server};
use crate::settings::declare::{
    Declared, Document, Fallback, Kind, NAME_SERVERS, PATH, TEXT, given_list, list, settings, word,
};
use crate::settings::{
    CniInstallSettings, IdentitySettings, InterceptionSettings, KubeletProbes, KubernetesWatch,
    NodeProbes, NodeSettings, PodSourceSettings, Profile, Settings, SpireApi,
};

/// The hint for an identity that all pods would share.
const SHARED_IDENTITY: &str = "use istio_ca, local_ca or spire.admin_socket";

settings! {
    /// the name of this node in the log, and of the Node in Kubernetes
    NAME: String = "node.name", NAME_OF_NODE,
        Fallback::Varies("none"), |s| s.node.name.clone();
    /// `underpass node`: the Unix socket of the agent of istio-cni (or Cilium), which reports the
    /// pods (ZDS) and installs their rules
    ZDS: PathBuf = "node.pods.zds", PATH, Fallback::Varies("none"), |s| pods_of(s, "zds");
    /// `underpass node`: the Unix socket for the CNI plugin `underpass cni`
    CNI: PathBuf = "node.pods.cni", PATH, Fallback::Varies("none"), |s| pods_of(s, "cni");
    /// `underpass node`: the folder with one file for each pod
    DIRECTORY: PathBuf = "node.pods.directory", PATH,
        Fallback::Varies("none"), |s| pods_of(s, "directory");
    /// with `node.pods.cni`: the runtime's folder of network configurations, such as
    /// `/etc/cni/net.d`. The daemon adds the plugin to the first one, and again after another
    /// program rewrites it; until then the node is not ready
    NET_DIR: PathBuf = "node.cni_install.net_dir", PATH,
        Fallback::Varies("none: `underpass cni install` does it"),
        |s| s.node.cni_install.as_ref().map(|folders| folders.net_dir.clone());
    /// with `net_dir`: the runtime's folder of plugins, such as `/opt/cni/bin`
    BIN_DIR: PathBuf = "node.cni_install.bin_dir", PATH, Fallback::Varies("none"),
        |s| s.node.cni_install.as_ref().map(|folders| folders.bin_dir.clone());
    /// with `node.pods.cni` and without Kubernetes: the folder in which the runtime (libcni) keeps
    /// the results of plugins, to find pods that the runtime did not add
    CNI_RESULTS: PathBuf = "node.cni_results", PATH,
        Fallback::Is(|| "/var/lib/cni/results".into()), |s| Some(s.node.cni_results.clone());
    /// namespaces whose pods are never enrolled, because other pods need these to start; none with
    /// `node.pods.zds`, whose agent selects the pods
    EXEMPT_NAMESPACES: Vec<String> = "node.exempt_namespaces",
        list("list of namespaces", |cursor, _| given_list(cursor, namespace)),
        Fallback::Is(default_exempt_namespaces), |s| Some(s.node.exempt_namespaces.clone());
    /// `translate`: rules in the host's network namespace give the node's own connections to its
    /// pods, such as the kubelet's probes, the source address that `interception.kubelet_probes`
    /// exempts; that setting is then `on` by default
    PROBES: NodeProbes = "node.probes", word("`translate`, `off`"),
        Fallback::Is(|| NodeProbes::Off), |s| Some(s.node.probes);
    /// with `node.pods.cni`: `auto`: if there is `node.kubeconfig` or a service account, the daemon
    /// watches the pods of the node `node.name` at the API server (service account, labels,
    /// annotations); `off`: it takes the service account from the mesh
    KUBERNETES: KubernetesWatch = "node.kubernetes", word("`auto`, `off`"),
        Fallback::Is(|| KubernetesWatch::Auto), |s| Some(s.node.kubernetes);
    /// the kubeconfig file with the address and the credential of the API server
    KUBECONFIG: PathBuf = "node.kubeconfig", PATH,
        Fallback::Varies("none: the service account of the daemon's pod"),
        |s| s.node.kubeconfig.clone();
    /// the DNS servers of the cluster (`clusterDNS` of the kubelet), for pods with the policy
    /// `ClusterFirst`; their domain is `dns.domain`
    CLUSTER_DNS: Vec<IpAddr> = "node.cluster_dns", NAME_SERVERS,
        Fallback::Called(Vec::new, "those of `dns.resolv_conf`"),
        |s| Some(s.node.cluster_dns.clone());
}

const NAME_OF_NODE: Kind<String> = Kind {
    read: |cursor, _| {
        let name = cursor.text()?;
        if name.is_empty() || !name.bytes().all(|c| c.is_ascii_graphic()) {
            cursor.problem("must be a name of visible ASCII characters");
            return None;
        }
        Some(name.to_owned())
    },
    ..TEXT
};

fn default_exempt_namespaces() -> Vec<String> {
    ["kube-system", "istio-system"].map(str::to_owned).to_vec()
}

fn pods_of(settings: &Settings, source: &str) -> Option<PathBuf> {
    let pods = settings.node.pods.as_ref().filter(|pods| pods.name() == source)?;
    Some(pods.path().to_owned())
}

fn namespace(text: &str) -> Result<String, String> {
    // A DNS label (Kubernetes), or a name in a mesh without Kubernetes.
    match text {
        "" => Err("must be the name of a namespace".to_owned()),
        text if text.contains('/') => {
            Err("must be the name of a namespace, without '/'".to_owned())
        }
        text => Ok(text.to_owned()),
    }
}

pub(super) fn node(document: Document<'_>) -> Option<NodeSettings> {
    let name = NAME.read(document);
    let (pods, cni_install) = (pods(document), cni_install(document));
    let exempt_namespaces = exempt_namespaces(document, pods.as_ref())?;
    if cni_install.is_some() && !matches!(pods, Some(PodSourceSettings::Cni(_))) {
        let node = document.root.key("node");
        node.key("cni_install").problem("has an effect only with node.pods.cni");
    }
    let probes = PROBES.read(document)?;
    if probes == NodeProbes::Translate {
        match pods {
            Some(PodSourceSettings::Cni(_) | PodSourceSettings::Directory(_)) => {}
            Some(PodSourceSettings::Zds(_)) => {
                PROBES.problem(
                    document,
                    "must be off with node.pods.zds: the agent translates probes",
                );
            }
            None => PROBES.problem(document, "has an effect only with node.pods"),
        }
    }
    let cni_results = CNI_RESULTS.read(document)?;
    let kubernetes = KUBERNETES.read(document)?;
    let kubeconfig = KUBECONFIG.read(document);
    if kubeconfig.is_some() && kubernetes == KubernetesWatch::Off {
        KUBECONFIG.problem(document, "has no effect with node.kubernetes: off");
    }
    if kubeconfig.is_some() && !matches!(pods, Some(PodSourceSettings::Cni(_))) {
        KUBECONFIG.problem(document, "has an effect only with node.pods.cni");
    }
    if kubeconfig.is_some() && name.is_none() {
        NAME.problem(document, "is missing: node.kubeconfig needs the name of this node");
    }
    let cluster_dns = CLUSTER_DNS.read(document)?;
    if !cluster_dns.is_empty() && pods.is_none() {
        CLUSTER_DNS.problem(document, "has an effect only with node.pods");
    }
    if cluster_dns.len() > MAX_NAME_SERVERS {
        CLUSTER_DNS.problem(document, "has more servers than resolvers ask, which is 3");
    }
    if cluster_dns.iter().copied().any(is_local_server) {
        CLUSTER_DNS.problem(document, "must not have addresses of the pods' loopback interfaces");
    }
    Some(NodeSettings {
        name,
        pods,
        exempt_namespaces,
        probes,
        kubernetes,
        kubeconfig,
        cluster_dns,
        cni_results,
        cni_install,
    })
}

fn cni_install(document: Document<'_>) -> Option<CniInstallSettings> {
    match (NET_DIR.read(document), BIN_DIR.read(document)) {
        (Some(net_dir), Some(bin_dir)) => Some(CniInstallSettings { net_dir, bin_dir }),
        (None, None) => None,
        (Some(_), None) | (None, Some(_)) => {
            let node = document.root.key("node");
            node.key("cni_install").problem("needs both net_dir and bin_dir");
            None
        }
    }
}

/// With an agent the default is empty: the agent has installed the rules of the pods that it
/// selected, and without a proxy these pods have no connection.
fn exempt_namespaces(
    document: Document<'_>,
    pods: Option<&PodSourceSettings>,
) -> Option<Vec<String>> {
    let namespaces = EXEMPT_NAMESPACES.read(document)?;
    if !matches!(pods, Some(PodSourceSettings::Zds(_))) {
        return Some(namespaces);
    }
    if EXEMPT_NAMESPACES.is_given(document) && !namespaces.is_empty() {
        EXEMPT_NAMESPACES
            .problem(document, "must be empty with node.pods.zds: the agent selects the pods");
    }
    Some(Vec::new())
}

fn pods(document: Document<'_>) -> Option<PodSourceSettings> {
    let sources = [
        ZDS.read(document).map(PodSourceSettings::Zds),
        CNI.read(document).map(PodSourceSettings::Cni),
        DIRECTORY.read(document).map(PodSourceSettings::Directory),
    ];
    let mut given = sources.into_iter().flatten();
    let first = given.next();
    if given.next().is_some() {
        let node = document.root.key("node");
        node.key("pods").problem("has more than one source: keep one of zds, cni and directory");
    }
    first
}

/// Rejects settings that contradict `node.pods`.
pub(super) fn refuse_settings_of_one_pod(document: Document<'_>) {
    let workload = document.root.key("workload");
    for key in ["name", "namespace", "serviceAccount"] {
        if workload.key(key).is_given() {
            let why = "has no effect with node.pods: each pod has its own";
            workload.key(key).problem(why);
        }
    }
}

/// Rejects an identity that all pods would share.
pub(super) fn refuse_shared_identity(document: Document<'_>, identity: &IdentitySettings) {
    let section = document.root.key("identity");
    match identity {
        IdentitySettings::Files(_) => section.problem(Reason::with_hint(
            "certificate, key and roots are of one identity, but each pod of node.pods has its own",
            SHARED_IDENTITY,
        )),
        IdentitySettings::Spire(spire) if spire.api == SpireApi::Workload => {
            section.key("spire").key("socket").problem(Reason::with_hint(
                "the Workload API has the identities of one process, but each pod of node.pods has its own",
                "set admin_socket instead, for the Delegated Identity API",
            ));
        }
        IdentitySettings::IstioCa(ca) if !ca.impersonate => section.key("istio_ca").problem(
            "impersonate must be true with node.pods: the daemon requests certificates for its pods",
        ),
        IdentitySettings::IstioCa(_)
        | IdentitySettings::LocalCa(_)
        | IdentitySettings::Spire(_) => {}
    }
}

/// Reports a source of identities that only a node daemon can use.
pub(super) fn refuse_identities_of_pods(document: Document<'_>, identity: &IdentitySettings) {
    if let IdentitySettings::Spire(spire) = identity
        && spire.api == SpireApi::DelegatedIdentity
    {
        document.root.key("identity").key("spire").key("admin_socket").problem(Reason::with_hint(
            "the Delegated Identity API is for the pods of a node (node.pods)",
            "set socket instead, for the Workload API",
        ));
    }
}

/// The interception settings of a node daemon, or of one of its pods. Those of a proxy for one pod
/// are unchanged.
pub(super) fn interception(
    document: Document<'_>,
    settings: InterceptionSettings,
    node: &NodeSettings,
) -> InterceptionSettings {
    let Some(pods) = &node.pods else { return settings };
    let section = document.root.key("interception");
    if settings.profile != Profile::Ambient {
        // The other profiles identify the proxy by its user, which pods of a node may have too.
        section.key("profile").problem("must be ambient with node.pods");
    }
    if settings.allow_host {
        section
            .key("allow_host")
            .problem("must be false with node.pods: a pod has its own namespace");
    }
    let install = !matches!(pods, PodSourceSettings::Zds(_));
    if section.key("install").is_given() && settings.install != install {
        section.key("install").problem(match install {
            true => "must be true with node.pods.cni and node.pods.directory: no other program installs the rules",
            false => "must be false with node.pods.zds: the agent installs the rules",
        });
    }
    let kubelet_probes = match node.probes {
        NodeProbes::Translate if !section.key("kubelet_probes").is_given() => KubeletProbes::On,
        _ => settings.kubelet_probes,
    };
    InterceptionSettings { install, kubelet_probes, ..settings }
}

#[cfg(test)]
mod tests;
