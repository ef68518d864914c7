//! The labfile.
pub mod topology;
