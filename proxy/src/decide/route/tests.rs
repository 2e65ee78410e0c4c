//! Tests of routing by tables: outbound, inbound and load balancing.

mod inbound;
mod load_balancing;
mod outbound;
