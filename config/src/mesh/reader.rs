//! Reads the documents of a mesh, and after a change only the changed ones.
//!
//! A parsed document shares its items with the snapshots that contain it. `source.rs` detects
//! changes, `document.rs` parses, and `builder.rs` combines documents.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use super::Mesh;
use super::builder::build;
use super::document::{Document, problem};
use super::shared::Shared;
use crate::error::{ConfigErrors, Problem};
use crate::watch::files;
use crate::watch::files::File;
use crate::yaml::read::Problems;

/// The maximum number of attempts to read a consistent set of files while they are being replaced.
const MAX_ATTEMPTS: usize = 3;

/// Reads documents, and caches those of the last read.
#[derive(Debug, Default)]
pub(super) struct Reader {
    /// The fingerprint of the last set of files, valid or not.
    seen: Option<u64>,
    /// Valid documents by the fingerprint of their file.
    known: HashMap<u64, Arc<Document>>,
    shared: Shared,
}

/// A file of a mesh.
enum Content {
    Known(u64, Arc<Document>),
    New(File),
}

impl Reader {
    /// Reads the mesh at `path`.
    pub(super) fn read(&mut self, path: &Path) -> Result<Mesh, ConfigErrors> {
        let loaded = self.load(path);
        self.read_loaded(path, loaded)
    }

    /// Reads the mesh at `path` if its files have changed.
    pub(super) fn read_if_new(&mut self, path: &Path) -> Option<Result<Mesh, ConfigErrors>> {
        let loaded = self.load(path);
        (self.seen != Some(loaded.0)).then(|| self.read_loaded(path, loaded))
    }

    /// Loads the files of `path`, and computes their common fingerprint.
    fn load(&self, path: &Path) -> (u64, Vec<Content>) {
        let mut files = Vec::new();
        let fingerprint = files::read_each(path, |file| {
            files.push(match self.known.get(&file.fingerprint) {
                Some(document) => Content::Known(file.fingerprint, document.clone()),
                None => Content::New(file),
            });
        });
        (fingerprint, files)
    }

    /// Parses files after loading a consistent set: one file may be replaced before it is loaded
    /// and another one afterwards. Loading is fast; changes during parsing count as the next
    /// change.
    fn read_loaded(
        &mut self,
        path: &Path,
        mut loaded: (u64, Vec<Content>),
    ) -> Result<Mesh, ConfigErrors> {
        for _ in 1..MAX_ATTEMPTS {
            if loaded.0 == files::fingerprint(path) {
                break;
            }
            loaded = self.load(path);
        }
        let (fingerprint, files) = loaded;
        self.seen = Some(fingerprint);
        let problems = Problems::default();
        let mut known = HashMap::with_capacity(files.len());
        let mut documents = Vec::with_capacity(files.len());
        for content in files {
            let (fingerprint, document) = match content {
                Content::Known(fingerprint, document) => (fingerprint, Some(document)),
                Content::New(file) => (file.fingerprint, self.document(file, &problems)),
            };
            if let Some(document) = document {
                known.insert(fingerprint, document.clone());
                documents.push(document);
            }
        }
        self.known = known;
        self.shared.drop_unused();
        combine(&documents, problems)
    }

    fn document(&mut self, file: File, problems: &Problems) -> Option<Arc<Document>> {
        let name = file.path.display().to_string();
        let reason = match file.content.map(String::from_utf8) {
            Ok(Ok(text)) => {
                let document = Document::read(&name, &text, &mut self.shared, problems);
                return document.map(Arc::new);
            }
            Ok(Err(error)) => format!("{name}: not valid UTF-8: {error}"),
            Err(error) => format!("{name}: cannot be read: {error}"),
        };
        let key = String::new();
        problems.add(Problem { key, value: None, reason, hint: None, origin: None });
        None
    }
}

/// Reads the mesh of one document; errors use `name` as its name.
pub(super) fn from_text(name: &str, text: &str) -> Result<Mesh, ConfigErrors> {
    let problems = Problems::default();
    let document = Document::read(name, text, &mut Shared::default(), &problems);
    combine(document.map(Arc::new).as_slice(), problems)
}

fn combine(documents: &[Arc<Document>], problems: Problems) -> Result<Mesh, ConfigErrors> {
    // References may lead to the unreadable file, so missing ones are not reported.
    if !problems.is_empty() {
        return problems.or_else(None);
    }
    let parts: Vec<_> = documents.iter().map(|document| document.items()).collect();
    build(&parts).or_else(|mistakes| {
        mistakes.into_iter().for_each(|mistake| problems.add(problem(documents, mistake)));
        problems.or_else(None)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Folder;

    fn workload(name: &str, address: u8) -> String {
        format!("workloads: [{{name: {name}, workloadIps: [10.0.0.{address}]}}]\n")
    }

    fn names(mesh: &Mesh) -> Vec<&str> {
        mesh.workloads().iter().map(|workload| &*workload.name).collect()
    }

    #[test]
    fn reads_files_again_that_were_replaced_during_the_read() {
        let folder = Folder::of_test();
        folder.write("a.yaml", &workload("a", 1));
        folder.write("b.yaml", &workload("b", 2));
        let (path, mut reader) = (folder.root(), Reader::default());
        let loaded = reader.load(&path);
        folder.write("a.yaml", &workload("c", 2));
        folder.write("b.yaml", &workload("d", 1));
        assert_eq!(names(&reader.read_loaded(&path, loaded).unwrap()), ["c", "d"]);
        assert!(reader.read_if_new(&path).is_none());
    }

    #[test]
    fn drops_cache_of_removed_files() {
        let folder = Folder::of_test();
        let (path, mut reader) = (folder.path("mesh.yaml"), Reader::default());
        for name in ["a", "b", "c"] {
            folder.write(
                "mesh.yaml",
                &format!("{}services: [{{hostname: in-{name}}}]", workload(name, 1)),
            );
            reader.read_if_new(&path).unwrap().unwrap();
            assert_eq!(reader.known.len(), 1);
            let kept = format!("{:?}", reader.shared);
            assert_eq!([kept.contains("in-b"), kept.contains("in-c")], [name == "b", name == "c"]);
        }
    }
}
