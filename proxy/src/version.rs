//! The version of the program.

/// The version, with the commit that the binary was built from.
pub(crate) const VERSION: &str = env!("UNDERPASS_VERSION");
