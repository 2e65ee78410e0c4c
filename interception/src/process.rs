//! Process-wide state: capabilities, user, resource limits, background threads, and processes that
//! can bypass the rules.

pub(crate) mod background;
pub(crate) mod bypass;
pub(crate) mod limits;
pub(crate) mod privileges;
pub(crate) mod separate;
pub(crate) mod user;
pub(crate) mod user_ids;
