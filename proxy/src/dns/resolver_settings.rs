//! The current resolver settings of a pod: those of its own file, or on a node those that follow
//! from the pod's specification and the file of the node.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use underpass_config::{DnsPolicy, PodDns, Settings, is_local_server};

use super::resolv_conf::{PORT, ResolvConf};
use super::resolv_file::ResolvFile;

/// Provides the resolver settings of one pod.
#[derive(Debug)]
pub(super) struct ResolverSettings {
    file: Arc<ResolvFile>,
    /// `None`: the file is the pod's own.
    specification: Option<Specification>,
    /// The content of the node's file, and the settings of the pod that follow from it.
    derived: Mutex<Option<[Arc<ResolvConf>; 2]>>,
}

/// The properties of a node's pod that its settings depend on.
#[derive(Debug, Clone)]
struct Specification {
    namespace: String,
    domain: String,
    /// The DNS servers of the cluster; empty: those of the node's file.
    cluster: Vec<IpAddr>,
    own: PodDns,
}

impl ResolverSettings {
    /// The settings of a pod. `file` is that of the process.
    pub(super) fn new(file: Arc<ResolvFile>, settings: &Settings) -> Self {
        let specification = settings.node.pods.is_some().then(|| Specification {
            namespace: settings.workload.namespace.clone(),
            domain: settings.dns.domain.clone(),
            cluster: settings.node.cluster_dns.clone(),
            own: settings.dns.pod.clone(),
        });
        Self { file, specification, derived: Mutex::default() }
    }

    /// The current settings. Reads the file again if it has changed.
    pub(super) fn current(&self) -> Arc<ResolvConf> {
        let file = self.file.current();
        let Some(specification) = &self.specification else { return file };
        // No code panics while it holds the lock.
        let mut derived = self.derived.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some([of_node, of_pod]) = &*derived
            && Arc::ptr_eq(of_node, &file)
        {
            return of_pod.clone();
        }
        let of_pod = Arc::new(specification.settings(&file));
        *derived = Some([file, of_pod.clone()]);
        of_pod
    }
}

impl Specification {
    /// The settings that the kubelet would write into the pod's file, on a node with this file.
    fn settings(&self, file: &ResolvConf) -> ResolvConf {
        let Self { cluster, own, .. } = self;
        let mut settings = match own.policy {
            DnsPolicy::None => ResolvConf::default(),
            DnsPolicy::Default => ResolvConf { search: self.search_of_node(file), ..file.clone() },
            DnsPolicy::ClusterFirst if cluster.is_empty() => {
                ResolvConf { search: self.search_of_cluster(file), ..file.clone() }
            }
            DnsPolicy::ClusterFirst => {
                let search = self.search_of_cluster(file);
                let servers = cluster.iter().map(server).collect();
                ResolvConf { servers, search, ..ResolvConf::default() }
            }
        };
        let servers = own.nameservers.iter().map(server).filter(|one| !is_local_server(one.ip()));
        servers.for_each(|server| settings.add_server(server));
        own.search.iter().for_each(|domain| settings.add_search(domain));
        own.options.iter().for_each(|option| settings.set(option));
        if settings.servers.is_empty() {
            settings.servers.clone_from(&file.servers);
        }
        settings
    }

    /// The search path of pods that use the cluster's servers: their own domains before those of
    /// the node.
    fn search_of_cluster(&self, file: &ResolvConf) -> Vec<String> {
        let Self { namespace, domain, .. } = self;
        let mut search =
            vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()];
        let of_node = self.search_of_node(file);
        let others: Vec<_> = of_node.into_iter().filter(|one| !search.contains(one)).collect();
        search.extend(others);
        search
    }

    /// The search path of the node's file without the namespace of the daemon, whose file it may
    /// be.
    fn search_of_node(&self, file: &ResolvConf) -> Vec<String> {
        let of_daemon = format!(".svc.{}", self.domain);
        file.search.iter().filter(|one| !one.ends_with(&of_daemon)).cloned().collect()
    }
}

fn server(address: &IpAddr) -> SocketAddr {
    SocketAddr::new(address.to_canonical(), PORT)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use underpass_config::PodSourceSettings;
    use underpass_config::testing::Folder;

    use super::*;
    use crate::node::testing::settings;

    /// The file of a daemon with the cluster's servers, of a kubelet, and of a pod.
    const OF_DAEMON: &str = "search istio-system.svc.cluster.local svc.cluster.local cluster.local example.com\n\
        nameserver 10.96.0.10\noptions ndots:5\n";
    const OF_HOST: &str = "search example.com\nnameserver 192.0.2.53\noptions timeout:1 rotate\n";

    fn dns(policy: DnsPolicy) -> PodDns {
        PodDns { policy, ..PodDns::default() }
    }

    /// The settings of a pod of the namespace `shop`, with its servers and search path as texts.
    fn of_pod(file: &str, cluster: &[&str], own: PodDns) -> (ResolvConf, String, String) {
        let [namespace, domain] = ["shop", "cluster.local"].map(str::to_owned);
        let cluster = cluster.iter().map(|server| server.parse().unwrap()).collect();
        let specification = Specification { namespace, domain, cluster, own };
        let settings = specification.settings(&ResolvConf::read(file));
        let servers: Vec<_> = settings.servers.iter().map(|one| one.ip().to_string()).collect();
        let search = settings.search.join(" ");
        (settings, servers.join(" "), search)
    }

    const CLUSTER_SEARCH: &str =
        "shop.svc.cluster.local svc.cluster.local cluster.local example.com";

    #[test]
    fn pod_of_unknown_policy_has_the_servers_of_the_cluster_and_the_path_of_its_namespace() {
        for (file, cluster, server) in [
            (OF_DAEMON, &[][..], "10.96.0.10"),
            (OF_HOST, &[], "192.0.2.53"),
            (OF_HOST, &["10.96.0.10", "fd00::a"], "10.96.0.10 fd00::a"),
        ] {
            let (_, servers, search) = of_pod(file, cluster, PodDns::default());
            assert_eq!((&*servers, &*search), (server, CLUSTER_SEARCH));
        }
        let (settings, ..) = of_pod(OF_HOST, &["10.96.0.10"], PodDns::default());
        assert!(!settings.rotate, "the options are not those of the host");
    }

    #[test]
    fn policy_of_the_pod_selects_its_servers() {
        let (settings, servers, search) = of_pod(OF_HOST, &["10.96.0.10"], dns(DnsPolicy::Default));
        assert_eq!((&*servers, &*search, settings.rotate), ("192.0.2.53", "example.com", true));
        let own = PodDns {
            nameservers: vec!["198.51.100.1".parse().unwrap()],
            search: vec!["A.example.".to_owned()],
            options: vec!["timeout:2".to_owned(), "use-vc".to_owned()],
            ..dns(DnsPolicy::None)
        };
        let (settings, servers, search) = of_pod(OF_HOST, &["10.96.0.10"], own);
        assert_eq!((&*servers, &*search), ("198.51.100.1", "a.example"));
        assert_eq!((settings.timeout.as_secs(), settings.use_tcp), (2, true));
    }

    #[test]
    fn own_servers_and_domains_follow_those_of_the_policy_without_duplicates() {
        let own = PodDns {
            nameservers: ["10.96.0.10", "198.51.100.1", "198.51.100.2", "198.51.100.3"]
                .map(|server| server.parse().unwrap())
                .to_vec(),
            search: ["svc.cluster.local", "a.example"].map(str::to_owned).to_vec(),
            ..PodDns::default()
        };
        let (_, servers, search) = of_pod(OF_HOST, &["10.96.0.10"], own);
        assert_eq!(servers, "10.96.0.10 198.51.100.1 198.51.100.2");
        assert_eq!(search, format!("{CLUSTER_SEARCH} a.example"));
    }

    #[test]
    fn server_on_the_loopback_interface_of_the_pod_is_left_out() {
        let local = ["127.0.0.1", "::1", "::ffff:127.0.0.53", "0.0.0.0"];
        let local = local.map(|one| one.parse().unwrap());
        let own = PodDns { nameservers: local.to_vec(), ..dns(DnsPolicy::None) };
        let (_, servers, _) = of_pod(OF_HOST, &[], own);
        assert_eq!(servers, "192.0.2.53", "no server remains: those of the node");
    }

    #[test]
    fn file_is_the_own_one_of_a_proxy_for_one_pod_only() {
        let folder = Folder::of_test();
        let path = folder.path("resolv.conf");
        fs::write(&path, OF_DAEMON).unwrap();
        let current = |settings: &Settings| {
            ResolverSettings::new(Arc::new(ResolvFile::new(&path)), settings).current()
        };
        let mut settings = settings(&[]);
        assert_eq!(*current(&settings), ResolvConf::read(OF_DAEMON));
        settings.node.pods = Some(PodSourceSettings::Directory("/pods".into()));
        settings.node.cluster_dns = vec!["10.0.0.7".parse().unwrap()];
        assert_eq!(current(&settings).servers, ["10.0.0.7:53".parse().unwrap()]);
    }
}
