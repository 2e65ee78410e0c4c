//! Finds leftovers: rules of an earlier run, another backend or another mesh that capture the same
//! traffic.
//!
//! Only reports them, and creates no tables: nf_tables is read over netlink, and legacy iptables
//! only where tables exist.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::backend::iptables::{Variant, is_own_chain, is_owner_chain, saved};
use crate::backend::{Backend, nftables, routes};
use crate::error::InterceptionError;
use crate::namespace::Entered;
use crate::plan::{Family, RulePlan, TABLE};

/// Rules that capture the same traffic.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Leftover {
    /// Their location: `the chains ISTIO_OUTPUT, ISTIO_PRERT in the table nat of iptables-legacy`.
    pub what: String,
    /// The probable owner.
    pub whose: LeftoverOwner,
}

/// The owner of leftover rules, guessed from their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LeftoverOwner {
    /// An earlier run of underpass with another backend.
    Underpass,
    /// An earlier run of underpass, or the mesh that uses chains with these names.
    Shared,
    /// Istio.
    Istio,
    /// Open Service Mesh.
    Osm,
    /// Linkerd.
    Linkerd,
    /// Unknown: legacy tables that cannot be read.
    Unknown,
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, whose } = self;
        match whose {
            LeftoverOwner::Underpass => write!(
                f,
                "{what}, from an earlier run of underpass with another `interception.backend`: \
                 remove with `underpass rules remove`"
            ),
            LeftoverOwner::Shared => write!(
                f,
                "{what}, from an earlier run of underpass with another `interception.backend`, or from Istio or Open \
                 Service Mesh: remove with `underpass rules remove`, which leaves chains that underpass did \
                 not install unless `--other-meshes` is given"
            ),
            LeftoverOwner::Istio => write!(
                f,
                "{what}, probably from Istio: remove this workload from Istio's mesh and recreate its pod, or \
                 remove with `underpass rules remove --other-meshes`"
            ),
            LeftoverOwner::Osm => write!(
                f,
                "{what}, probably from Open Service Mesh: remove this workload from its mesh and recreate its \
                 pod"
            ),
            LeftoverOwner::Linkerd => write!(
                f,
                "{what}, probably from Linkerd: remove this workload from Linkerd's mesh and recreate its \
                 pod"
            ),
            LeftoverOwner::Unknown => write!(
                f,
                "{what}, which cannot be read, so it is unknown whether its rules capture traffic: to \
                 check it, install the package `iptables` and grant the capability NET_RAW"
            ),
        }
    }
}

/// Finds leftovers. underpass's current rules are in `backend`.
///
/// # Errors
///
/// An existing table cannot be read.
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

/// Finds ip rules with the marks and tables of a plan but with another protocol number, such as
/// Istio's.
async fn in_policy_routing(entered: &Entered) -> Result<Vec<Leftover>, InterceptionError> {
    let rules = routes::duplicate_foreign_rules(entered, &RulePlan::routes_and_addresses()).await?;
    let leftover = |rule| Leftover { what: format!("the {rule}"), whose: LeftoverOwner::Istio };
    Ok(rules.into_iter().map(leftover).collect())
}

async fn in_nftables(entered: &Entered, own: Backend) -> Result<Vec<Leftover>, InterceptionError> {
    let tables = match nftables::tables(entered).await {
        Ok(tables) => tables,
        // With legacy iptables, the kernel may lack nf_tables, and this request fails.
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
            "inet" if is_istio_table(&table) => found.push(whole(LeftoverOwner::Istio)),
            "ip" | "ip6" if is_iptables_table(&table) => {
                let chains = nftables::chains(entered, family, &table).await?;
                found.extend(in_chains(&chains, own == Backend::Iptables(Variant::Nft), &place));
            }
            _ => {}
        }
    }
    Ok(found)
}

/// Returns true for a table of Istio's native nftables mode, such as `istio-ambient-nat`.
pub(crate) fn is_istio_table(table: &str) -> bool {
    ["istio-ambient-", "istio-proxy-"].iter().any(|prefix| table.starts_with(prefix))
}

fn is_iptables_table(table: &str) -> bool {
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
            // Report a failure without failing: the nftables backend needs neither these programs
            // nor NET_RAW.
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

/// Lists the existing tables of legacy iptables, from a file of the kernel. Running iptables-legacy
/// would create tables. The file is missing if the kernel has no legacy iptables.
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

/// Checks whether a namespace has tables of legacy iptables, from a thread outside of it.
#[derive(Debug)]
pub struct LegacyTables([(Family, Result<File, io::ErrorKind>); 2]);

impl LegacyTables {
    /// Opens the kernel's lists of legacy tables in this namespace.
    pub(crate) fn open(_: &Entered) -> Self {
        let open = |family| File::open(legacy_names(family)).map_err(|error| error.kind());
        Self([Family::V4, Family::V6].map(|family| (family, open(family))))
    }

    /// Returns true if tables exist. `None` if a list was created since [`open`](Self::open), for
    /// example by loading a kernel module. An unreadable list counts as empty.
    pub(crate) fn exist(&self) -> Option<bool> {
        let mut any = false;
        for (family, list) in &self.0 {
            any |= match list {
                Ok(list) => list.read_at(&mut [0], 0).is_ok_and(|read| read > 0),
                // A newly loaded module adds its list to every namespace.
                Err(io::ErrorKind::NotFound) if Path::new(legacy_names(*family)).exists() => {
                    return None;
                }
                Err(_) => false,
            };
        }
        Some(any)
    }
}

/// Groups the chains of a table by owner. `own` is true if underpass's current rules are in this
/// table.
fn in_chains(chains: &[String], own: bool, table: &str) -> Vec<Leftover> {
    let mut owners: BTreeMap<LeftoverOwner, Vec<&str>> = BTreeMap::new();
    // Istio and OSM use the same names, so the owner chain decides.
    let marked = chains.iter().any(|chain| owner(chain) == Some(LeftoverOwner::Underpass));
    for chain in chains.iter().filter(|chain| !is_owner_chain(chain)) {
        let owner = owner(chain).map(|owner| match owner {
            LeftoverOwner::Shared if marked => LeftoverOwner::Underpass,
            owner => owner,
        });
        if let Some(owner) = owner.filter(|_| !(own && is_own_chain(chain))) {
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
    .or_else(|| is_own_chain(chain).then_some(LeftoverOwner::Shared))
    .or_else(|| chain.starts_with("ISTIO_").then_some(LeftoverOwner::Istio))
    .or_else(|| chain.starts_with("PROXY_").then_some(LeftoverOwner::Osm))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found_leftovers(chains: &[&str], own: bool) -> Vec<(LeftoverOwner, String)> {
        let chains: Vec<_> = chains.iter().map(ToString::to_string).collect();
        let found = in_chains(&chains, own, "table nat of iptables-legacy").into_iter();
        found.map(|leftover| (leftover.whose, leftover.what)).collect()
    }

    #[test]
    fn attributes_chains_by_name() {
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
        assert_eq!(found_leftovers(&chains, false), expected);
    }

    #[test]
    fn ignores_own_chains_of_installed_rules() {
        let chains = ["ISTIO_OUTPUT", "UNDERPASS_REJECT", "ISTIO_OTHER"];
        let of = |chains: &str| format!("the {chains} in the table nat of iptables-legacy");
        assert_eq!(
            found_leftovers(&chains, true),
            [(LeftoverOwner::Istio, of("chain ISTIO_OTHER"))]
        );
        let expected = [
            (LeftoverOwner::Underpass, of("chains ISTIO_OUTPUT, UNDERPASS_REJECT")),
            (LeftoverOwner::Istio, of("chain ISTIO_OTHER")),
        ];
        assert_eq!(found_leftovers(&chains, false), expected);
        assert_eq!(found_leftovers(&["ISTIO_OUTPUT", "UNDERPASS_OWNER"], false).len(), 1);
    }

    #[test]
    fn leftover_names_removal_command() {
        let what = "the nftables table inet underpass".to_owned();
        let text = Leftover { what, whose: LeftoverOwner::Underpass }.to_string();
        assert!(text.contains("`underpass rules remove`"), "{text}");
    }
}
