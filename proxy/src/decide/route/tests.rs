//! The way out, case by case, and the way in.

mod inbound;
mod load_balancing;
mod outbound;
