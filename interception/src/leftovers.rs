//! What there is in this namespace besides our rules that would also catch traffic, or that an older
//! run, another backend or another mesh left.
//!
//! It is looked for, and said; nothing is removed here. Looking creates nothing either: nf_tables is
//! read over netlink, and of legacy iptables only the tables that exist.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::backend::Backend;
use crate::iptables::{Variant, is_ours, is_owner_chain, saved};
use crate::plan::{Family, RulePlan, TABLE};
use crate::{Entered, InterceptionError, nftables, routes};

/// Something that was found.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Leftover {
    /// What it is: `the chains ISTIO_OUTPUT, ISTIO_PRERT in the table nat of iptables-legacy`.
    pub what: String,
    /// Whose it probably is.
    pub whose: LeftoverOwner,
}

/// Who installed something, as far as names tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LeftoverOwner {
    /// An earlier run of underpass, with another backend.
    Underpass,
    /// Such a run, or the mesh that has chains of these names.
    Shared,
    /// Istio.
    Istio,
    /// Open Service Mesh.
    Osm,
    /// Linkerd.
    Linkerd,
    /// Nobody can tell: legacy tables that cannot be read.
    Unknown,
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, whose } = self;
        match whose {
            LeftoverOwner::Underpass => write!(
                f,
                "{what}, of an earlier underpass with another `interception.backend`: \
                 remove with `underpass rules remove`"
            ),
            LeftoverOwner::Shared => write!(
                f,
                "{what}, of an earlier underpass with another `interception.backend`, or of Istio or Open \
                 Service Mesh: remove with `underpass rules remove`, which leaves chains that underpass did \
                 not install unless `--other-meshes` is given"
            ),
            LeftoverOwner::Istio => write!(
                f,
                "{what}, probably of Istio: take this workload out of Istio's mesh and recreate its pod, or \
                 remove with `underpass rules remove --other-meshes`"
            ),
            LeftoverOwner::Osm => write!(
                f,
                "{what}, probably of Open Service Mesh: take this workload out of its mesh, and start its \
                 pod anew"
            ),
            LeftoverOwner::Linkerd => write!(
                f,
                "{what}, probably of Linkerd: take this workload out of Linkerd's mesh, and start its pod \
                 anew"
            ),
            LeftoverOwner::Unknown => write!(
                f,
                "{what}, which cannot be read, so that nobody can tell whether its rules catch anything: to \
                 have it looked into, install the package `iptables` and grant the capability NET_RAW"
            ),
        }
    }
}

/// Looks for what our own rules, which are in `backend`, are not.
///
/// # Errors
///
/// What exists cannot be read.
pub(crate) async fn leftovers(
    entered: &Entered,
    backend: Backend,
) -> Result<Vec<Leftover>, InterceptionError> {
    let mut found = in_nftables(entered, backend).await?;
    for family in [Family::V4, Family::V6] {
        found.extend(in_legacy(entered, backend, family).await);
    }
    found.extend(in_policy_routing(entered).await?);
    found.sort();
    Ok(found)
}

/// Istio's ip rules have the marks and tables of ours, without our protocol number.
async fn in_policy_routing(entered: &Entered) -> Result<Vec<Leftover>, InterceptionError> {
    let rules = routes::rules_of_others(entered, &RulePlan::beside_rules()).await?;
    let leftover = |rule| Leftover { what: format!("the {rule}"), whose: LeftoverOwner::Istio };
    Ok(rules.into_iter().map(leftover).collect())
}

async fn in_nftables(entered: &Entered, own: Backend) -> Result<Vec<Leftover>, InterceptionError> {
    let tables = match nftables::tables(entered).await {
        Ok(tables) => tables,
        // Legacy is for kernels without nf_tables, where nobody answers.
        Err(_) if own == Backend::Iptables(Variant::Legacy) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for (family, table) in tables {
        let place = format!("nftables table {family} {table}");
        let whole = |whose| Leftover { what: format!("the {place}"), whose };
        match family {
            "inet" if table == TABLE && own != Backend::Nftables => {
                found.push(whole(LeftoverOwner::Underpass));
            }
            "inet" if is_istios(&table) => found.push(whole(LeftoverOwner::Istio)),
            "ip" | "ip6" if is_of_iptables(&table) => {
                let chains = nftables::chains(entered, family, &table).await?;
                found.extend(in_chains(&chains, own == Backend::Iptables(Variant::Nft), &place));
            }
            _ => {}
        }
    }
    Ok(found)
}

/// Istio's native nftables mode: `istio-ambient-nat`, `istio-proxy-mangle`.
pub(crate) fn is_istios(table: &str) -> bool {
    ["istio-ambient-", "istio-proxy-"].iter().any(|prefix| table.starts_with(prefix))
}

fn is_of_iptables(table: &str) -> bool {
    ["raw", "mangle", "nat", "filter"].contains(&table)
}

async fn in_legacy(entered: &Entered, own: Backend, family: Family) -> Vec<Leftover> {
    let program = match family {
        Family::V4 => "iptables-legacy",
        Family::V6 => "ip6tables-legacy",
    };
    let names = legacy_tables(entered, family);
    if names.is_empty() {
        return Vec::new();
    }
    let ruleset =
        match saved(entered, "read the legacy iptables rules", Variant::Legacy, family).await {
            Ok(ruleset) => ruleset,
            // Interception by nftables needs neither its programs nor NET_RAW.
            Err(error) => {
                tracing::debug!(%error, "legacy iptables cannot be read");
                let what = format!("the table {} of {program}", names.join(", "));
                return vec![Leftover { what, whose: LeftoverOwner::Unknown }];
            }
        };
    let tables = ruleset.tables.into_iter();
    tables
        .flat_map(|table| {
            let chains: Vec<_> = table.chains.into_iter().map(|chain| chain.name).collect();
            let own = own == Backend::Iptables(Variant::Legacy);
            in_chains(&chains, own, &format!("table {} of {program}", table.name))
        })
        .collect()
}

/// The tables of legacy iptables that exist. Asking iptables-legacy for a table creates it; this
/// file names those that exist, and is absent where the kernel has no legacy iptables.
pub(crate) fn legacy_tables(_: &Entered, family: Family) -> Vec<String> {
    let names = fs::read_to_string(legacy_names(family)).unwrap_or_default();
    names.split_whitespace().map(str::to_owned).collect()
}

fn legacy_names(family: Family) -> &'static str {
    match family {
        Family::V4 => "/proc/thread-self/net/ip_tables_names",
        Family::V6 => "/proc/thread-self/net/ip6_tables_names",
    }
}

/// Whether a namespace has tables of legacy iptables, asked again and again by a thread that may be
/// in another one.
#[derive(Debug)]
pub(crate) struct LegacyTables([(Family, Result<File, io::ErrorKind>); 2]);

impl LegacyTables {
    /// Opens the kernel's lists; they stay those of this namespace.
    pub(crate) fn open(_: &Entered) -> Self {
        let open = |family| File::open(legacy_names(family)).map_err(|error| error.kind());
        Self([Family::V4, Family::V6].map(|family| (family, open(family))))
    }

    /// Whether there are tables now; `None` if a list exists only since [`open`](Self::open), as
    /// when a kernel module has been loaded. What may not be read has none.
    pub(crate) fn exist(&self) -> Option<bool> {
        let mut any = false;
        for (family, list) in &self.0 {
            any |= match list {
                Ok(list) => list.read_at(&mut [0], 0).is_ok_and(|read| read > 0),
                // A module has its list in every namespace.
                Err(io::ErrorKind::NotFound) if Path::new(legacy_names(*family)).exists() => {
                    return None;
                }
                Err(_) => false,
            };
        }
        Some(any)
    }
}

/// What the chains of a table are, together for each owner. `own`: our rules are there too.
fn in_chains(chains: &[String], own: bool, table: &str) -> Vec<Leftover> {
    let mut owners: BTreeMap<LeftoverOwner, Vec<&str>> = BTreeMap::new();
    // Its chains have the names of Istio's and OSM's; one of its own says whose they are.
    let marked = chains.iter().any(|chain| owner(chain) == Some(LeftoverOwner::Underpass));
    for chain in chains.iter().filter(|chain| !is_owner_chain(chain)) {
        let owner = owner(chain).map(|owner| match owner {
            LeftoverOwner::Shared if marked => LeftoverOwner::Underpass,
            owner => owner,
        });
        if let Some(owner) = owner.filter(|_| !(own && is_ours(chain))) {
            owners.entry(owner).or_default().push(chain);
        }
    }
    owners
        .into_iter()
        .map(|(whose, chains)| {
            let kind = if chains.len() == 1 { "chain" } else { "chains" };
            let what = format!("the {kind} {} in the {table}", chains.join(", "));
            Leftover { what, whose }
        })
        .collect()
}

fn owner(chain: &str) -> Option<LeftoverOwner> {
    [
        ("UNDERPASS_", LeftoverOwner::Underpass),
        ("PROXY_INIT_", LeftoverOwner::Linkerd),
        ("OSM_PROXY_", LeftoverOwner::Osm),
    ]
    .into_iter()
    .find_map(|(prefix, owner)| chain.starts_with(prefix).then_some(owner))
    .or_else(|| is_ours(chain).then_some(LeftoverOwner::Shared))
    .or_else(|| chain.starts_with("ISTIO_").then_some(LeftoverOwner::Istio))
    .or_else(|| chain.starts_with("PROXY_").then_some(LeftoverOwner::Osm))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(chains: &[&str], own: bool) -> Vec<(LeftoverOwner, String)> {
        let chains: Vec<_> = chains.iter().map(ToString::to_string).collect();
        let found = in_chains(&chains, own, "table nat of iptables-legacy").into_iter();
        found.map(|leftover| (leftover.whose, leftover.what)).collect()
    }

    #[test]
    fn chains_are_told_by_their_names() {
        let chains = [
            "OUTPUT",
            "ISTIO_OUTPUT",
            "ISTIO_PRERT",
            "OSM_PROXY_INBOUND",
            "PROXY_INIT_OUTPUT",
            "KUBE",
        ];
        let of = |chains: &str| format!("the {chains} in the table nat of iptables-legacy");
        let expected = [
            (LeftoverOwner::Shared, of("chains ISTIO_OUTPUT, ISTIO_PRERT")),
            (LeftoverOwner::Osm, of("chain OSM_PROXY_INBOUND")),
            (LeftoverOwner::Linkerd, of("chain PROXY_INIT_OUTPUT")),
        ];
        assert_eq!(found(&chains, false), expected);
    }

    #[test]
    fn our_own_chains_are_no_leftover_where_our_rules_are() {
        let chains = ["ISTIO_OUTPUT", "UNDERPASS_REJECT", "ISTIO_OTHER"];
        let of = |chains: &str| format!("the {chains} in the table nat of iptables-legacy");
        assert_eq!(found(&chains, true), [(LeftoverOwner::Istio, of("chain ISTIO_OTHER"))]);
        let expected = [
            (LeftoverOwner::Underpass, of("chains ISTIO_OUTPUT, UNDERPASS_REJECT")),
            (LeftoverOwner::Istio, of("chain ISTIO_OTHER")),
        ];
        assert_eq!(found(&chains, false), expected);
        assert_eq!(found(&["ISTIO_OUTPUT", "UNDERPASS_OWNER"], false).len(), 1);
    }

    #[test]
    fn a_leftover_says_how_it_is_removed() {
        let what = "the nftables table inet underpass".to_owned();
        let text = Leftover { what, whose: LeftoverOwner::Underpass }.to_string();
        assert!(text.contains("`underpass rules remove`"), "{text}");
    }
}
