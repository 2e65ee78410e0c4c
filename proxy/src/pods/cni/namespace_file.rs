//! Opens the files of pods' network namespaces, whose paths come from the runtime.

use std::fs;
use std::path::{Path, PathBuf};

use underpass_interception::{InterceptionError, Namespace};

/// Opens a namespace. Tests open kinds of namespaces that need no privilege.
pub(crate) type OpenNamespace = fn(&Path) -> Result<Namespace, InterceptionError>;

/// Opens the namespace at `path`, which only root can have changed.
pub(crate) fn open(path: &Path) -> Result<Namespace, InterceptionError> {
    Namespace::open_guarded(&without_link(path))
}

/// Runtimes name `/var/run`, which is a link of root's to `/run`, and links are refused.
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
    fn paths_of_runtimes_have_no_link() {
        let linked = fs::read_link("/var/run").is_ok();
        let expected = if linked { "/run/netns/cni-1" } else { "/var/run/netns/cni-1" };
        assert_eq!(without_link(Path::new("/var/run/netns/cni-1")), Path::new(expected));
        assert_eq!(without_link(Path::new("/run/netns/a")), Path::new("/run/netns/a"));
    }

    #[test]
    fn link_of_a_process_is_refused() {
        let error = open(Path::new("/proc/self/ns/net")).unwrap_err();
        assert!(format!("{error:?}").contains("symbolic link"), "{error:?}");
    }
}
