//! The machine that labs run on.
