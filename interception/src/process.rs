//! Process-wide state: capabilities, user, resource limits, and other processes that can bypass the
//! rules.

pub(crate) mod bypass;
pub(crate) mod limits;
pub(crate) mod privileges;
mod user;
pub(crate) mod user_ids;
