//! Kernel tests of the rules in the host's namespace: nft installs the same rules, and changes are
//! detected.

use libtest_mimic::Failed;
use underpass_interception::{HOST_TABLE, HostPlan, HostRules, Namespace, NamespaceAccess};

use crate::Case;
use crate::pod::{command, equal, inside, isolated_namespace};

pub(crate) const CASES: &[Case] = &[
    ("host rules: nft installs the same rules from the text", nft_installs_the_same_rules),
    ("host rules: any change is a difference that applying repairs", changes_are_repaired),
    ("host rules: pods are added and removed, and the table removed", pods_are_added_and_removed),
    (
        "host rules: an update changes addresses only and fails after a change",
        updates_change_addresses,
    ),
];

fn plan(pods: &[&str]) -> Result<HostPlan, Failed> {
    let pods: Result<Vec<_>, _> = pods.iter().map(|pod| pod.parse()).collect();
    Ok(HostPlan::new(pods?))
}

fn list(namespace: &Namespace) -> Result<String, Failed> {
    command(namespace, &format!("nft -nn list table inet {HOST_TABLE}"))
}

/// Runs code with the rules of a new namespace.
fn with_rules(
    name: &str,
    code: impl AsyncFnOnce(&Namespace, HostRules) -> Result<(), Failed> + Send,
) -> Result<(), Failed> {
    let namespace = isolated_namespace(name)?;
    inside(&namespace, async || {
        let rules = HostRules::prepare(NamespaceAccess::current()?).await?;
        code(&namespace, rules).await
    })
}

fn nft_installs_the_same_rules() -> Result<(), Failed> {
    with_rules("host-text", async |namespace, rules| {
        for pods in [&[][..], &["10.0.0.1"], &["10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"]] {
            let plan = plan(pods)?;
            rules.apply(plan.clone()).await?;
            equal("difference", rules.verify(plan.clone()).await?, None)?;
            let installed = list(namespace)?;
            let file = std::env::temp_dir().join(format!("host-rules-{}", std::process::id()));
            std::fs::write(&file, plan.to_string())?;
            command(namespace, &format!("nft -f {}", file.display()))?;
            std::fs::remove_file(&file)?;
            equal("by nft", list(namespace)?, installed)?;
            equal("difference after nft", rules.verify(plan).await?, None)?;
        }
        Ok(())
    })
}

fn changes_are_repaired() -> Result<(), Failed> {
    with_rules("host-changes", async |namespace, rules| {
        let plan = plan(&["10.0.0.1", "fd00::1"])?;
        rules.apply(plan.clone()).await?;
        let expected = list(namespace)?;
        for change in [
            format!("delete table inet {HOST_TABLE}"),
            format!("flush chain inet {HOST_TABLE} postrouting"),
            format!("add element inet {HOST_TABLE} pods {{ 10.0.0.9 }}"),
            format!("flush set inet {HOST_TABLE} pods-v6"),
            format!("add rule inet {HOST_TABLE} prerouting accept"),
            format!("add chain inet {HOST_TABLE} other"),
        ] {
            command(namespace, &format!("nft {change}"))?;
            equal(&change, rules.verify(plan.clone()).await?.is_some(), true)?;
            rules.apply(plan.clone()).await?;
            equal(&change, list(namespace)?, expected.clone())?;
        }
        Ok(())
    })
}

fn pods_are_added_and_removed() -> Result<(), Failed> {
    with_rules("host-pods", async |namespace, rules| {
        let (one, both) = (plan(&["10.0.0.1"])?, plan(&["10.0.0.1", "10.0.0.2"])?);
        rules.apply(one.clone()).await?;
        equal("one is not both", rules.verify(both.clone()).await?.is_some(), true)?;
        rules.apply(both.clone()).await?;
        equal("both", rules.verify(both).await?, None)?;
        rules.apply(one.clone()).await?;
        equal("one", rules.verify(one).await?, None)?;
        rules.remove().await?;
        rules.remove().await?;
        equal("removed", list(namespace).is_err(), true)
    })
}

fn updates_change_addresses() -> Result<(), Failed> {
    with_rules("host-update", async |namespace, rules| {
        let old = plan(&["10.0.0.1", "10.0.0.2", "fd00::1"])?;
        rules.apply(old.clone()).await?;
        let new = plan(&["10.0.0.2", "10.0.0.3", "10.0.0.4", "fd00::2"])?;
        equal("updated", rules.update(old.clone(), new.clone()).await?, true)?;
        equal("difference", rules.verify(new.clone()).await?, None)?;
        let other = plan(&["10.0.0.2"])?;
        equal("other rules", rules.update(new.clone(), other).await?, false)?;
        equal("unchanged", rules.verify(new.clone()).await?, None)?;
        command(namespace, &format!("nft flush set inet {HOST_TABLE} pods"))?;
        equal("after a change", rules.update(new, old).await.is_err(), true)
    })
}
