//! Tries rules in a temporary network namespace: the kernel loads the modules that they need, and
//! accepts or rejects every rule. No other namespace is affected.

use underpass_config::InterceptionSettings;

use crate::backend::Backend;
use crate::error::InterceptionError;
use crate::interception::Interception;
use crate::namespace::{Namespace, NamespaceThread};
use crate::plan::Ports;
use crate::privileged::NamespaceAccess;

/// The result of a trial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleTrial {
    /// The backend that installed the rules.
    pub backend: Backend,
    /// The number of rules.
    pub rules: usize,
    /// Whether the kernel lists the rules as they were installed.
    pub intact: bool,
}

/// Installs the rules of `settings` in a new network namespace, and reads them back. `None` for the
/// profile without rules.
///
/// # Errors
///
/// The namespace cannot be created, for example without SYS_ADMIN, or the rules cannot be
/// installed.
pub async fn try_rules(
    settings: &InterceptionSettings,
    ports: Ports,
    thread: &NamespaceThread,
) -> Result<Option<RuleTrial>, InterceptionError> {
    let namespace = Namespace::create_temporary()?;
    namespace.set_loopback_up().await?;
    let access = NamespaceAccess::new(namespace, thread.clone());
    // The temporary namespace is never the host's.
    let settings = InterceptionSettings { allow_host: true, ..settings.clone() };
    let Some(interception) = Interception::prepare(&access, &settings, ports).await? else {
        return Ok(None);
    };
    interception.install().await?;
    let intact = interception.verify().await?.is_none();
    let (backend, rules) = (interception.backend(), interception.plan().rules().len());
    Ok(Some(RuleTrial { backend, rules, intact }))
}
