//! The version of the program.

/// The version, with the commit that the binary was built from.
pub(crate) const VERSION: &str = env!("UNDERPASS_VERSION");

/// The version, the target and the features of the binary.
pub(crate) const LONG_VERSION: &str = concat!(
    env!("UNDERPASS_VERSION"),
    "\ntarget: ",
    env!("UNDERPASS_TARGET"),
    "\nfeatures: ",
    env!("UNDERPASS_FEATURES")
);
