//! What the process itself holds: capabilities, its user, limits, and which other processes can
//! bypass the rules.

pub(crate) mod bypass;
pub(crate) mod limits;
pub(crate) mod privileges;
mod user;
pub(crate) mod user_ids;
