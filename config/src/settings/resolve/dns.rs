//! The settings `dns`.

use std::path::PathBuf;

use crate::pod::dns::PodDns;
use crate::settings::DnsSettings;
use crate::settings::declare::{Document, Fallback, Kind, PATH, RATE_OR_OFF, Written, settings};

settings! {
    /// the file with the DNS servers, in the format of resolv.conf(5), for names that the mesh does
    /// not know and for workloads with a `hostname`; `underpass node`: the file of the node, from
    /// which those of its pods follow
    RESOLV_CONF: PathBuf = "dns.resolv_conf", PATH,
        Fallback::Is(|| PathBuf::from("/etc/resolv.conf")), |s| Some(s.dns.resolv_conf.clone());
    /// the domain of Kubernetes services
    DOMAIN: String = "dns.domain", DOMAIN_NAME,
        Fallback::Is(|| "cluster.local".to_owned()), |s| Some(s.dns.domain.clone());
    // An application asks again for each name and each domain of its search path, but rarely more
    // than some hundred times a second. The servers are those of all pods.
    /// the maximum number of queries of a pod to its DNS servers per second, a tenth of them at
    /// once; further ones fail; `off`: unlimited
    QUERIES_PER_SECOND: Option<u32> = "dns.queries_per_second", RATE_OR_OFF,
        Fallback::Is(|| Some(5000)), |s| Some(s.dns.queries_per_second);
    /// the maximum number of lookups per second at the control plane that the queries of a pod
    /// cause (`mesh.xds.on_demand`), a tenth of them at once. A name needs up to some dozens, with
    /// its completions and wildcards. Further queries wait 1 s at most and then fail; `off`:
    /// unlimited
    LOOKUPS_PER_SECOND: Option<u32> = "dns.lookups_per_second", RATE_OR_OFF,
        Fallback::Is(|| Some(1000)), |s| Some(s.dns.lookups_per_second);
}

const DOMAIN_NAME: Kind<String> = Kind {
    name: "domain",
    is_list: false,
    read: |cursor, _| {
        let domain = cursor.text()?.trim_end_matches('.').to_ascii_lowercase();
        let is_label = |label: &str| {
            let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_');
            (1..=63).contains(&label.len()) && label.bytes().all(allowed)
        };
        if domain.len() <= 200 && domain.split('.').all(is_label) {
            return Some(domain);
        }
        cursor.problem("must be a domain, such as cluster.local");
        None
    },
    write: |domain| Written::scalar(domain),
};

pub(super) fn dns(document: Document<'_>) -> Option<DnsSettings> {
    Some(DnsSettings {
        resolv_conf: RESOLV_CONF.read(document)?,
        domain: DOMAIN.read(document)?,
        queries_per_second: QUERIES_PER_SECOND.read(document)?,
        lookups_per_second: LOOKUPS_PER_SECOND.read(document)?,
        pod: PodDns::default(),
    })
}

#[cfg(test)]
mod tests {
    use crate::settings::load::settings_of;

    #[test]
    fn domain_is_in_lower_case_and_must_be_a_domain() {
        let loaded = settings_of("dns: {domain: Cluster.Example.}").unwrap();
        assert_eq!(loaded.dns.domain, "cluster.example");
        for wrong in ["a..b", "'a b'", "-.b/"] {
            let errors = settings_of(&format!("dns: {{domain: {wrong}}}")).unwrap_err();
            assert!(errors.to_string().contains("must be a domain"), "{wrong}: {errors}");
        }
    }
}
