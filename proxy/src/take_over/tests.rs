//! Two processes of which one takes over, in one process.
