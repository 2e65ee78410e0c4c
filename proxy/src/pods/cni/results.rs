//! Reads the pod containers that a runtime has connected to a network: libcni keeps the result of
//! each addition in a file until the deletion (`cniCacheV1`, libcni/api.go).
//!
//! Without Kubernetes the results show which pods run without a call of the plugin. Containers that
//! are not pods are omitted, because their networks do not need the plugin.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::attachment::PodReference;

/// The maximum number of files, and the maximum size of one in bytes.
const MAX_FILES: usize = 4096;
const MAX_SIZE: u64 = 1 << 20;

/// The folder of the results.
#[derive(Debug, Clone)]
pub(in crate::pods::cni) struct CniResults {
    folder: PathBuf,
}

/// A pod's container that is connected to a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::pods::cni) struct Sandbox {
    pub(in crate::pods::cni) container: String,
    pub(in crate::pods::cni) pod: PodReference,
    /// The file of its network namespace.
    pub(in crate::pods::cni) namespace_path: PathBuf,
}

impl CniResults {
    pub(in crate::pods::cni) fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The containers of pods; empty without a folder, which libcni creates at the first addition.
    pub(in crate::pods::cni) fn sandboxes(&self) -> Vec<Sandbox> {
        let files = fs::read_dir(&self.folder).into_iter().flatten().flatten().take(MAX_FILES);
        // An unreadable file is being written or removed.
        files.filter_map(|file| sandbox(&read(&file.path()).ok()?)).collect()
    }
}

fn read(file: &Path) -> io::Result<Value> {
    let mut text = Vec::new();
    fs::File::open(file)?.take(MAX_SIZE).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

fn sandbox(result: &Value) -> Option<Sandbox> {
    let text = |key: &str| result.get(key)?.as_str();
    if text("kind") != Some("cniCacheV1") {
        return None;
    }
    let container = text("containerId")?;
    let argument = |key: &str| {
        let mut pairs = result.get("cniArgs")?.as_array()?.iter().filter_map(Value::as_array);
        let pair = pairs.find(|pair| pair.first().and_then(Value::as_str) == Some(key))?;
        pair.get(1)?.as_str().filter(|value| !value.is_empty())
    };
    let (namespace, name) = (argument("K8S_POD_NAMESPACE")?, argument("K8S_POD_NAME")?);
    let uid = argument("K8S_POD_UID").unwrap_or(container);
    let pod = PodReference::new(namespace, name, uid).ok()?;
    let path = text("netns").or_else(|| sandbox_of_interface(result))?;
    Some(Sandbox { container: container.to_owned(), pod, namespace_path: path.into() })
}

/// libcni before 1.3 stores the path only in the result.
fn sandbox_of_interface(result: &Value) -> Option<&str> {
    let mut interfaces = result.pointer("/result/interfaces")?.as_array()?.iter();
    interfaces.find_map(|interface| interface.get("sandbox")?.as_str().filter(|s| !s.is_empty()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::pods::cni::testing::Folder;

    fn result() -> Value {
        json!({
            "kind": "cniCacheV1", "containerId": "c1", "ifName": "eth0", "networkName": "pods",
            "netns": "/run/netns/a",
            "cniArgs": [["IgnoreUnknown", "1"], ["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", "web"],
                ["K8S_POD_UID", "u1"]],
            "result": {"interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/run/netns/b"}]},
        })
    }

    #[test]
    fn complete_results_of_pods_are_read_as_sandboxes() {
        let folder = Folder::new();
        let results = CniResults::new(folder.path("results"));
        assert_eq!(results.sandboxes(), []);
        fs::create_dir(folder.path("results")).unwrap();
        fs::write(folder.path("results/pods-c1-eth0"), result().to_string()).unwrap();
        fs::write(folder.path("results/unfinished"), "{").unwrap();
        let pod = PodReference::new("shop", "web", "u1").unwrap();
        let (container, namespace_path) = ("c1".to_owned(), "/run/netns/a".into());
        assert_eq!(results.sandboxes(), [Sandbox { container, pod, namespace_path }]);
    }

    #[test]
    fn older_results_have_the_path_at_their_interface() {
        let mut older = result();
        older["netns"].take();
        assert_eq!(sandbox(&older).unwrap().namespace_path, Path::new("/run/netns/b"));
        older["result"]["interfaces"] = json!([{"name": "veth1", "sandbox": ""}]);
        assert_eq!(sandbox(&older), None);
    }

    #[test]
    fn containers_that_are_no_pods_are_left_out() {
        for (key, value) in [
            ("cniArgs", json!([["IgnoreUnknown", "1"]])),
            ("cniArgs", json!(null)),
            ("kind", json!("other")),
            ("containerId", json!(7)),
        ] {
            let mut other = result();
            other[key] = value;
            assert_eq!(sandbox(&other), None, "{other}");
        }
    }
}
