//! The machine that labs run on: this one where its KVM works, else one that is emulated on it.
//!
//! - `emulated`: the emulated machine, and commands carried into it

pub mod emulated;

use std::{ffi::OsString, path::Path, process::ExitCode};

use crate::paths::Paths;

/// Runs this process as a part of the emulated host, if that is what it was started for.
pub fn internal(arguments: impl IntoIterator<Item = OsString>) -> Option<ExitCode> {
    let arguments: Vec<OsString> = arguments.into_iter().skip(1).take(2).collect();
    let (verb, argument) = (arguments.first()?.to_str()?, arguments.get(1).map(Path::new));
    let result = match (verb, argument) {
        ("host-init", Some(config)) => emulated::init::run(config),
        ("host-supervise", None) => Paths::from_env()
            .map_err(|error| error.to_string())
            .and_then(|paths| emulated::supervisor::run(&paths).map_err(|error| error.to_string()))
            .map(|()| 0),
        ("host-carried", Some(request)) => emulated::carried::run(request).map_err(|error| error.to_string()),
        ("host-order", Some(order)) => emulated::init::order(&order.to_string_lossy())
            .map(|()| 0)
            .map_err(|error| error.to_string()),
        _ => return None,
    };
    Some(match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("lab: {error}");
            ExitCode::FAILURE
        }
    })
}
