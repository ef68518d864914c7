//! The machine that labs run on: this one where its KVM works, else one that is emulated on it.
//!
//! - `probe`: whether KVM runs the kernel-mode code of guests here
//! - `doctor`: what this machine has and lacks
//! - `emulated`: the emulated machine, and commands carried into it

pub mod doctor;
pub mod emulated;
pub mod probe;

use std::{env, ffi::OsString, path::Path, process::ExitCode};

use crate::{bake, paths::Paths, say::say};

/// Why there is no host for labs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something that is no host.
    #[error("there is no host {0:?}: labs run on `local` or `emulated` (--host, LAB_HOST)")]
    Unknown(String),
    /// Hosts of a later version.
    #[error(
        "this version of lab cannot run labs on {0}: use the host `local` or `emulated`, or run lab there"
    )]
    Remote(String),
    /// The emulated one.
    #[error(transparent)]
    Emulated(#[from] emulated::Error),
    /// Its folders.
    #[error(transparent)]
    Paths(#[from] crate::paths::Error),
}

/// The host that labs run on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// This machine.
    Local,
    /// The emulated one.
    Emulated {
        /// Why not this one; `None` if the user wanted it so.
        reason: Option<String>,
    },
}

/// Whether this process runs in the emulated host, where everything takes several times as long.
pub fn is_slow() -> bool {
    env::var_os("LAB_CARRIED").is_some()
}

/// Chooses the host: the one that is asked for, else this machine where its KVM works.
pub fn choose(forced: Option<&str>) -> Result<Choice, Error> {
    // A command that was carried here is where it belongs, whatever its arguments say.
    if is_slow() {
        return Ok(Choice::Local);
    }
    match forced {
        Some("local") => Ok(Choice::Local),
        Some("emulated") => Ok(Choice::Emulated { reason: None }),
        Some(host) if host.starts_with("ssh://") => Err(Error::Remote(host.into())),
        Some(host) => Err(Error::Unknown(host.into())),
        None => Ok(match probe::run().reason() {
            None => Choice::Local,
            Some(reason) => Choice::Emulated { reason: Some(reason) },
        }),
    }
}

/// Runs this process as a part of the emulated host or of a bake, if that is what it was started for.
pub fn internal(arguments: impl IntoIterator<Item = OsString>) -> Option<ExitCode> {
    let arguments: Vec<OsString> = arguments.into_iter().skip(1).take(3).collect();
    let (verb, argument) = (arguments.first()?.to_str()?, arguments.get(1).map(Path::new));
    let port = arguments.get(2).and_then(|port| port.to_str()?.parse().ok());
    let result = match (verb, argument) {
        ("host-init", Some(config)) => emulated::init::run(config, port),
        ("host-supervise", None) => Paths::from_env()
            .map_err(|error| error.to_string())
            .and_then(|paths| emulated::supervisor::run(&paths).map_err(|error| error.to_string()))
            .map(|()| 0),
        ("host-carried", Some(request)) => emulated::carried::run(request).map_err(|error| error.to_string()),
        ("host-order", Some(order)) => {
            emulated::orders::order(&order.to_string_lossy()).map(|()| 0).map_err(|error| error.to_string())
        }
        (_, None) => bake::internal(arguments.first()?)?,
        _ => return None,
    };
    Some(match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            say(format_args!("lab: {error}"));
            ExitCode::FAILURE
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_chosen_by_name() {
        assert_eq!(choose(Some("local")).unwrap(), Choice::Local);
        assert_eq!(choose(Some("emulated")).unwrap(), Choice::Emulated { reason: None });
        assert!(matches!(choose(Some("ssh://me@there")), Err(Error::Remote(_))));
        let error = choose(Some("locall")).unwrap_err().to_string();
        assert_eq!(
            error,
            "there is no host \"locall\": labs run on `local` or `emulated` (--host, LAB_HOST)"
        );
    }

    #[test]
    fn other_verbs_are_not_internal() {
        assert!(internal(["lab", "up"].map(OsString::from)).is_none());
        assert!(internal(["lab", "host", "status"].map(OsString::from)).is_none());
        assert!(internal(["lab"].map(OsString::from)).is_none());
    }
}
