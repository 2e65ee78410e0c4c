//! Tests of following meshes, on the real file system.

use std::fs;

use tokio::time::{sleep, timeout};

use super::*;
use crate::mesh::PolicyAction;
use crate::testing::Folder;

/// Longer than the polling interval. The clock is paused and advances by itself.
const LONGER_THAN_POLL_INTERVAL: Duration = Duration::from_secs(100);

fn workload(name: &str, address: u8) -> String {
    format!("workloads: [{{name: {name}, workloadIps: [10.0.0.{address}]}}]\n")
}

fn names(mesh: &Mesh) -> Vec<&str> {
    mesh.workloads().iter().map(|workload| &*workload.name).collect()
}

fn open(folder: &Folder, name: &str) -> (MeshSource, Arc<Mesh>) {
    MeshSource::open(Some(&folder.path(name)), &FileWatcher::default(), at_once).unwrap()
}

fn at_once(work: Box<dyn FnOnce() + Send>) {
    work();
}

async fn next(source: &mut MeshSource) -> Result<Arc<Mesh>, ConfigErrors> {
    timeout(LONGER_THAN_POLL_INTERVAL, source.changed()).await.expect("a change is reported")
}

async fn next_names(source: &mut MeshSource) -> Vec<String> {
    let mesh = next(source).await.unwrap();
    names(&mesh).into_iter().map(str::to_owned).collect()
}

async fn stays_silent(source: &mut MeshSource) {
    timeout(LONGER_THAN_POLL_INTERVAL, source.changed()).await.expect_err("no change is reported");
}

#[tokio::test(start_paused = true)]
async fn file_gives_initial_snapshot_and_one_per_change() {
    let folder = Folder::of_test();
    folder.write("mesh.yaml", &workload("a", 1));
    let (mut source, first) = open(&folder, "mesh.yaml");
    assert_eq!(names(&first), ["a"]);
    folder.write("mesh.yaml", &workload("b", 1));
    assert_eq!(next_names(&mut source).await, ["b"]);
    folder.write("new.yaml", &workload("c", 1));
    folder.rename("new.yaml", "mesh.yaml");
    assert_eq!(next_names(&mut source).await, ["c"]);
    folder.write("mesh.yaml", &workload("c", 1));
    stays_silent(&mut source).await;
}

#[tokio::test(start_paused = true)]
async fn documents_of_folder_form_one_mesh() {
    let folder = Folder::of_test();
    fs::create_dir(folder.path("mesh")).unwrap();
    let (mut source, empty) = open(&folder, "mesh");
    assert!(empty.workloads().is_empty());
    folder.write("mesh/b.json", "{\"services\": [{\"hostname\": \"s\"}]}");
    folder.write(
        "mesh/a.yaml",
        "workloads: [{name: a, workloadIps: [10.0.0.1], services: {default/s: {80: 80}}}]\n",
    );
    folder.write("mesh/.hidden.yaml", "nonsense");
    folder.write("mesh/notes.txt", "nonsense");
    folder.write("mesh/below/c.yaml", "nonsense");
    let mesh = next(&mut source).await.unwrap();
    assert_eq!(&mesh.services()[0].endpoints[0].workload, mesh.workloads()[0]);
    fs::remove_file(folder.path("mesh/b.json")).unwrap();
    let errors = next(&mut source).await.unwrap_err();
    let file = folder.path("mesh/a.yaml");
    assert_eq!(
        errors.to_string(),
        format!("{}:1:13: workloads[0].services: there is no service default/s", file.display())
    );
    fs::remove_file(file).unwrap();
    assert_eq!(next_names(&mut source).await, [""; 0]);
}

#[test]
fn service_of_last_file_owns_shared_address() {
    let folder = Folder::of_test();
    for name in ["b", "c", "a"] {
        let service = format!("services: [{{hostname: {name}, vips: [/10.1.0.1]}}]\n");
        folder.write(&format!("mesh/{name}.yaml"), &service);
    }
    let mesh = Mesh::from_file(&folder.path("mesh")).unwrap();
    let names: Vec<_> = mesh.services().iter().map(|service| &*service.name).collect();
    assert_eq!(names, ["a", "b", "c"]);
    let meant = mesh.service("", [10, 1, 0, 1].into(), "default").unwrap();
    assert_eq!(&*meant.name, "c");
}

#[tokio::test(start_paused = true)]
async fn mistakes_across_documents_name_file() {
    let folder = Folder::of_test();
    folder.write("mesh/a.yaml", &workload("a", 1));
    folder.write("mesh/b.yaml", &format!("# second\n{}", workload("b", 1)));
    fs::write(folder.path("mesh/c.yaml"), b"\xff").unwrap();
    let errors = Mesh::from_file(&folder.path("mesh")).unwrap_err().to_string();
    assert!(errors.contains("c.yaml: not valid UTF-8"), "{errors}");
    fs::remove_file(folder.path("mesh/c.yaml")).unwrap();
    let errors = Mesh::from_file(&folder.path("mesh")).unwrap_err().to_string();
    let place = "b.yaml:2:13: workloads[0].workloadIps: 10.0.0.1 already belongs to default/a";
    assert!(errors.ends_with(place), "{errors}");
    // A broken link is a missing document, which is an error.
    folder.swap("nowhere", "mesh/b.yaml");
    let errors = Mesh::from_file(&folder.path("mesh")).unwrap_err().to_string();
    assert!(errors.contains("b.yaml: cannot be read"), "{errors}");
}

#[tokio::test(start_paused = true)]
async fn unchanged_files_are_not_read_again() {
    let folder = Folder::of_test();
    folder.write("mesh/a.yaml", &workload("a", 1));
    folder.write("mesh/b.yaml", &workload("b", 2));
    let (mut source, first) = open(&folder, "mesh");
    folder.write("mesh/b.yaml", &workload("c", 2));
    let second = next(&mut source).await.unwrap();
    assert_eq!(names(&second), ["a", "c"]);
    assert!(Arc::ptr_eq(first.workloads()[0], second.workloads()[0]));
    // Unchanged documents are not read again either after other documents had mistakes, of their
    // own or in combination.
    folder.write("mesh/b.yaml", "nonsense");
    next(&mut source).await.unwrap_err();
    folder.write("mesh/b.yaml", &workload("d", 1));
    let errors = next(&mut source).await.unwrap_err().to_string();
    assert!(errors.ends_with("10.0.0.1 already belongs to default/a"), "{errors}");
    fs::remove_file(folder.path("mesh/b.yaml")).unwrap();
    folder.write("mesh/0.yaml", &workload("d", 2));
    let third = next(&mut source).await.unwrap();
    assert_eq!(names(&third), ["a", "d"]);
    assert!(Arc::ptr_eq(first.workloads()[0], third.workloads()[0]));
    // The same text in another file is another document.
    fs::remove_file(folder.path("mesh/0.yaml")).unwrap();
    folder.rename("mesh/a.yaml", "mesh/c.yaml");
    folder.write("mesh/d.yaml", &workload("a", 2));
    let errors = next(&mut source).await.unwrap_err().to_string();
    assert!(errors.contains("d.yaml:1:13: workloads[0].name: duplicate"), "{errors}");
}

#[tokio::test(start_paused = true)]
async fn references_follow_changes_in_other_files() {
    let policy = |action: &str| {
        let scope = "scope: WorkloadSelector, rules: []";
        format!("policies: [{{name: p, namespace: shop, {scope}, action: {action}}}]\n")
    };
    let service = "services: [{hostname: s, vips: [/10.1.0.1]}]\n";
    let refers = "services: {default/s: {80: 8080}}, authorizationPolicies: [shop/p]";
    let folder = Folder::of_test();
    let a = format!("workloads: [{{name: a, workloadIps: [10.0.0.1], {refers}}}]\n");
    folder.write("mesh/a.yaml", &a);
    folder.write("mesh/policies.yaml", &policy("Allow"));
    folder.write("mesh/services.yaml", service);
    let (mut source, first) = open(&folder, "mesh");
    let action = |mesh: &Mesh| mesh.workloads()[0].policies[0].action;
    assert_eq!(action(&first), PolicyAction::Allow);
    folder.write("mesh/policies.yaml", &policy("Deny"));
    let second = next(&mut source).await.unwrap();
    assert_eq!((action(&first), action(&second)), (PolicyAction::Allow, PolicyAction::Deny));
    let [endpoint] = &*second.services()[0].endpoints else { panic!("it has one") };
    assert!(Arc::ptr_eq(&endpoint.workload, second.workloads()[0]));
    assert_eq!(endpoint.ports.get(80), Some(8080));
    folder.write("mesh/policies.yaml", "policies: []");
    let errors = next(&mut source).await.unwrap_err().to_string();
    let place = "a.yaml:1:13: workloads[0].authorizationPolicies: there is no policy shop/p";
    assert!(errors.ends_with(place), "{errors}");
    // The service moves to another document, and gets a waypoint.
    let moved = "services: [{hostname: s, waypoint: {destination: /10.0.0.1}}]\n";
    folder.write("mesh/policies.yaml", &(policy("Deny") + moved));
    fs::remove_file(folder.path("mesh/services.yaml")).unwrap();
    let third = next(&mut source).await.unwrap();
    assert_eq!(action(&third), PolicyAction::Deny);
    assert_eq!(third.services().len(), 1);
    assert_eq!(third.services()[0].endpoints, second.services()[0].endpoints);
    assert!(third.services()[0].waypoint.is_some());
    assert!(third.service("", [10, 1, 0, 1].into(), "default").is_none());
}

#[tokio::test(start_paused = true)]
async fn missing_file_is_error_at_start_and_later() {
    let folder = Folder::of_test();
    let path = folder.path("mesh");
    let errors = MeshSource::open(Some(&path), &FileWatcher::default(), at_once).unwrap_err();
    assert!(errors.to_string().contains("cannot be read"), "{errors}");
    folder.write("mesh/a.yaml", &workload("a", 1));
    let (mut source, _) = open(&folder, "mesh");
    fs::remove_dir_all(&path).unwrap();
    next(&mut source).await.unwrap_err();
    stays_silent(&mut source).await;
    folder.write("mesh/a.yaml", &workload("a", 1));
    assert_eq!(next_names(&mut source).await, ["a"]);
}

#[tokio::test(start_paused = true)]
async fn mesh_without_file_stays_empty() {
    let (mut source, mesh) = MeshSource::open(None, &FileWatcher::default(), at_once).unwrap();
    assert!(mesh.workloads().is_empty());
    timeout(LONGER_THAN_POLL_INTERVAL * 1000, source.changed())
        .await
        .expect_err("no change is reported");
}

#[tokio::test(start_paused = true)]
async fn invalid_content_is_reported_at_each_change() {
    let folder = Folder::of_test();
    folder.write("mesh.yaml", &workload("a", 1));
    let (mut source, _) = open(&folder, "mesh.yaml");
    for garbage in
        ["", "{", "workloads: [", "workloads: [{}]", "\u{0}", "a: b", "- - -", "workloads"]
    {
        folder.write("mesh.yaml", garbage);
        assert!(!next(&mut source).await.unwrap_err().problems.is_empty(), "{garbage}");
    }
    stays_silent(&mut source).await;
    folder.write("mesh.yaml", &workload("a", 1));
    assert_eq!(next_names(&mut source).await, ["a"]);
}

#[tokio::test(start_paused = true)]
async fn change_survives_cancelled_wait() {
    let folder = Folder::of_test();
    folder.write("mesh.yaml", &workload("a", 1));
    let (mut source, _) = open(&folder, "mesh.yaml");
    folder.write("mesh.yaml", &workload("b", 1));
    let impatient = async {
        loop {
            if let Ok(mesh) = timeout(Duration::from_secs(1), source.changed()).await {
                return mesh.unwrap();
            }
        }
    };
    assert_eq!(
        names(&timeout(LONGER_THAN_POLL_INTERVAL, impatient).await.expect("it is reported")),
        ["b"]
    );
}

#[tokio::test(start_paused = true)]
async fn failed_background_read_is_error_and_next_change_is_read() {
    let folder = Folder::of_test();
    folder.write("mesh.yaml", &workload("a", 1));
    let watcher = FileWatcher::default();
    let (mut source, _) =
        MeshSource::open(Some(&folder.path("mesh.yaml")), &watcher, drop).unwrap();
    folder.write("mesh.yaml", &workload("b", 1));
    let errors = next(&mut source).await.unwrap_err().to_string();
    assert!(errors.ends_with("mesh.yaml: no thread to read it"), "{errors}");
    source.background = at_once;
    folder.write("mesh.yaml", &workload("c", 1));
    assert_eq!(next_names(&mut source).await, ["c"]);
}

#[tokio::test(start_paused = true)]
async fn replaced_snapshot_is_freed_when_unused() {
    let mesh = Arc::new(Mesh::from_text("mesh", &workload("a", 1)).unwrap());
    let kept = mesh.workloads()[0].clone();
    let retirement = tokio::spawn(retire_mesh(mesh.clone(), at_once));
    sleep(RETIRE_POLL_INTERVAL * 2).await;
    assert!(!retirement.is_finished());
    drop(mesh);
    timeout(LONGER_THAN_POLL_INTERVAL, retirement).await.unwrap().unwrap();
    assert_eq!(&*kept.name, "a");
}
