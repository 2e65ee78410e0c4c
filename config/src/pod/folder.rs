//! Follows a folder with one file for each pod of a node.

use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::error::ConfigErrors;
use crate::pod::file::PodFile;
use crate::watch::{FileWatcher, PathWatch, files};

/// The maximum size of a file. In Kubernetes a pod's labels and annotations have at most 256 KiB
/// together, and rarely a tenth of it.
const MAX_FILE_BYTES: u64 = 512 << 10;
/// The maximum number of files. Kubernetes recommends at most 110 pods per node.
const MAX_FILES: usize = 4096;
/// The write permissions of the group and of other users.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// A folder of pod files.
#[derive(Debug)]
pub struct PodFolder {
    path: PathBuf,
    watch: PathWatch,
}

/// A file of the folder, read but not parsed.
#[derive(Debug)]
pub struct PodDocument {
    /// The path of the file.
    pub path: PathBuf,
    /// A hash of the content. Collisions are improbable.
    pub fingerprint: u64,
    content: io::Result<String>,
}

impl PodFolder {
    /// Opens the folder and starts to watch it.
    ///
    /// # Errors
    /// The folder does not exist, users other than its owner can write to it, or it cannot
    /// be watched.
    pub fn open(path: &Path, watcher: &FileWatcher) -> Result<Self, ConfigErrors> {
        let error =
            |reason: String| ConfigErrors::one(format!("{}: {reason}", path.display()), None);
        let metadata = path.metadata().map_err(|cause| {
            error(format!("the folder of pods (node.pods.directory) cannot be read: {cause}"))
        })?;
        if !metadata.is_dir() {
            return Err(error("must be a folder with one file for each pod".to_owned()));
        }
        if metadata.mode() & WRITABLE_BY_OTHERS != 0 {
            return Err(error(
                "users other than its owner can write into the folder of pods, and so choose \
                 identities: remove their permission with chmod go-w"
                    .to_owned(),
            ));
        }
        Ok(Self { path: path.to_owned(), watch: watcher.watch_path(path)? })
    }

    /// The path of the folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the pod files, sorted by name: those that end in .yaml, .yml or .json and are not
    /// hidden.
    ///
    /// # Errors
    /// The folder cannot be read, or contains too many files.
    pub fn read(&self) -> Result<Vec<PodDocument>, ConfigErrors> {
        let error =
            |reason: String| ConfigErrors::one(format!("{}: {reason}", self.path.display()), None);
        // `files::list` would treat a path that is not a folder as a single file.
        let paths = self.path.read_dir().and_then(|_| files::list(&self.path));
        let paths = paths.map_err(|cause| error(format!("cannot be read: {cause}")))?;
        if paths.len() > MAX_FILES {
            return Err(error(format!("has more than {MAX_FILES} pod files")));
        }
        Ok(paths.into_iter().map(PodDocument::read).collect())
    }

    /// Waits until the files may have changed and no change follows for a moment. Cancel-safe.
    pub async fn changed(&mut self) {
        self.watch.settled().await;
    }
}

impl PodDocument {
    fn read(path: PathBuf) -> Self {
        let content = read_bounded(&path);
        let mut hasher = DefaultHasher::new();
        match &content {
            Ok(text) => hasher.write(text.as_bytes()),
            Err(error) => hasher.write(error.to_string().as_bytes()),
        }
        hasher.write_u8(content.is_err().into());
        Self { path, fingerprint: hasher.finish(), content }
    }

    /// Parses the file.
    ///
    /// # Errors
    /// All mistakes in the file, or the reason why it could not be read.
    pub fn parse(&self) -> Result<PodFile, ConfigErrors> {
        let name = self.path.display().to_string();
        match &self.content {
            Ok(text) => PodFile::parse(&name, text),
            Err(error) => Err(ConfigErrors::one(format!("{name}: cannot be read: {error}"), None)),
        }
    }
}

fn read_bounded(path: &Path) -> io::Result<String> {
    // Opening a named pipe would wait for its writer.
    if !path.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut text = String::new();
    File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    if u64::try_from(text.len()).is_ok_and(|length| length > MAX_FILE_BYTES) {
        return Err(io::Error::other(format!("it is larger than {} KiB", MAX_FILE_BYTES >> 10)));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;
    use crate::testing::Folder;

    fn opened(folder: &Folder) -> PodFolder {
        fs::set_permissions(folder.root(), Permissions::from_mode(0o755)).unwrap();
        PodFolder::open(&folder.root(), &FileWatcher::default()).unwrap()
    }

    #[tokio::test]
    async fn missing_or_unsafe_folder_is_an_error() {
        let folder = Folder::of_test();
        let open =
            |path: &Path| PodFolder::open(path, &FileWatcher::default()).unwrap_err().to_string();
        assert!(open(&folder.path("missing")).contains("node.pods.directory"));
        folder.write("file", "");
        assert!(open(&folder.path("file")).contains("must be a folder"));
        fs::set_permissions(folder.root(), Permissions::from_mode(0o777)).unwrap();
        assert!(open(&folder.root()).contains("chmod go-w"));
    }

    #[tokio::test]
    async fn reads_documents_by_name_and_no_others() {
        let test = Folder::of_test();
        let folder = opened(&test);
        for (name, text) in [("b.yaml", "b"), ("a.yml", "a"), (".hidden.yaml", "x"), ("c.txt", "x")]
        {
            test.write(name, text);
        }
        fs::create_dir(test.path("folder.yaml")).unwrap();
        let documents = folder.read().unwrap();
        let names: Vec<_> =
            documents.iter().map(|document| document.path.file_name().unwrap()).collect();
        assert_eq!(names, ["a.yml", "b.yaml"]);
        assert_ne!(documents[0].fingerprint, documents[1].fingerprint);
    }

    #[tokio::test]
    async fn unreadable_file_is_an_error_of_that_file_only() {
        let test = Folder::of_test();
        let folder = opened(&test);
        let too_large = usize::try_from(MAX_FILE_BYTES).unwrap() + 1;
        test.write("a.yaml", &"#".repeat(too_large));
        fs::write(test.path("b.yaml"), b"\xff").unwrap();
        symlink("/nowhere", test.path("c.yaml")).unwrap();
        symlink("/dev/zero", test.path("d.yaml")).unwrap();
        let documents = folder.read().unwrap();
        for (document, reason) in
            documents.iter().zip(["larger than", "UTF-8", "No such file", "not a regular file"])
        {
            let error = document.parse().unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        assert_eq!(documents.len(), 4);
    }

    #[tokio::test]
    async fn vanished_folder_is_an_error() {
        let test = Folder::of_test();
        let folder = opened(&test);
        fs::rename(test.root(), test.root().with_extension("away")).unwrap();
        assert!(folder.read().unwrap_err().to_string().contains("cannot be read"));
        fs::rename(test.root().with_extension("away"), test.root()).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn change_of_pod_folder_ends_the_wait() {
        let test = Folder::of_test();
        let mut folder = opened(&test);
        test.write(".staged", "uid: a");
        test.rename(".staged", "a.yaml");
        folder.changed().await;
        assert_eq!(folder.read().unwrap().len(), 1);
    }
}
