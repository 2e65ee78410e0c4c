//! Opens the files of pods' network namespaces, at paths from the container runtime.

use std::fs;
use std::path::{Path, PathBuf};

use underpass_interception::{InterceptionError, Namespace};

/// Opens a namespace. Tests open other kinds of namespaces, which need no privilege.
pub(crate) type OpenNamespace = fn(&Path) -> Result<Namespace, InterceptionError>;

/// Opens the namespace at `path`, all parts of which must belong to root.
pub(crate) fn open(path: &Path) -> Result<Namespace, InterceptionError> {
    Namespace::open_secure_path(&without_link(path))
}

/// Runtimes use `/var/run`, which is root's link to `/run`. Links are rejected, so the path is
/// changed.
fn without_link(path: &Path) -> PathBuf {
    let target = fs::read_link("/var/run").unwrap_or_default();
    let is_link = ["/run", "../run"].iter().any(|run| target == Path::new(run));
    match path.strip_prefix("/var/run") {
        Ok(rest) if is_link => Path::new("/run").join(rest),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn var_run_is_replaced_by_run_in_namespace_paths() {
        let linked = fs::read_link("/var/run").is_ok();
        let expected = if linked { "/run/netns/cni-1" } else { "/var/run/netns/cni-1" };
        assert_eq!(without_link(Path::new("/var/run/netns/cni-1")), Path::new(expected));
        assert_eq!(without_link(Path::new("/run/netns/a")), Path::new("/run/netns/a"));
    }

    #[test]
    fn namespace_path_through_a_link_is_refused() {
        let error = open(Path::new("/proc/self/ns/net")).unwrap_err();
        assert!(format!("{error:?}").contains("symbolic link"), "{error:?}");
    }
}
