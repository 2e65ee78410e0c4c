//! Kernel tests of namespaces, as other programs see them.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::thread;
use std::time::Duration;

use libtest_mimic::Failed;
use tokio::time::{Instant, timeout};
use underpass_interception::{
    Interception, InterceptionError, Namespace, NamespaceAccess, NamespaceThread, SandboxRemedy,
    enter_sandbox,
};

use crate::Case;
use crate::pod::{ConnectedPods, PORTS, command, equal, isolated_namespace, runtime, settings};

/// The time that the kernel or another thread may take.
const DEADLINE: Duration = Duration::from_secs(10);

pub(crate) const CASES: &[Case] = &[
    ("a named namespace can be entered by its path and its name", entered_by_path_and_name),
    ("a path with links or unsafe folders is refused", insecure_path_is_refused),
    ("a namespace of another kind cannot be entered", other_kind_of_namespace_is_refused),
    ("the current namespace can be entered by its path", entered_by_descriptor),
    ("deleting a namespace frees its name", deleting_frees_the_name),
    ("a name that is taken is refused", existing_name_is_refused),
    ("a route uses its gateway, which must be of the same family", route_uses_its_gateway),
    (
        "one thread installs rules in 250 namespaces, and stays in none",
        one_thread_installs_rules_everywhere,
    ),
    (
        "rules are installed, watched and removed from outside of a namespace",
        rules_are_managed_from_outside,
    ),
    ("a deleted namespace ends with its last handle", deleted_namespace_ends_with_last_handle),
    ("a sandbox cannot be entered by one of several threads", sandbox_requires_a_single_thread),
];

/// Prints addresses that show which namespace a program is in.
const ADDRESSES: &str = "ip -o address show dev eth0";

fn entered_by_path_and_name() -> Result<(), Failed> {
    let wired = ConnectedPods::new("entered")?;
    let inside = command(&wired.remote, ADDRESSES)?;
    let here = Namespace::current()?;
    let path = wired.remote.path().display();
    equal(
        "by path",
        command(&here, &format!("nsenter --net={path} {ADDRESSES}"))?,
        inside.clone(),
    )?;
    equal("by name", command(&here, "ip -n entered-remote -o address show dev eth0")?, inside)
}

fn insecure_path_is_refused() -> Result<(), Failed> {
    let namespace = isolated_namespace("guarded")?;
    let named = Path::new("/run/netns/guarded");
    equal("by its path", Namespace::open_secure_path(named)?.id(), namespace.id())?;
    let folder = Path::new("/run/guarded");
    fs::create_dir_all(folder)?;
    let (link, linked_folder) = (folder.join("link"), folder.join("netns"));
    std::os::unix::fs::symlink(named, &link)?;
    std::os::unix::fs::symlink("/run/netns", &linked_folder)?;
    let unsafe_folder = folder.join("unsafe");
    fs::create_dir_all(&unsafe_folder)?;
    fs::write(unsafe_folder.join("file"), "")?;
    fs::write(folder.join("file"), "")?;
    fs::set_permissions(&unsafe_folder, fs::Permissions::from_mode(0o777))?;
    for (path, reason) in [
        (link, "symbolic link"),
        (linked_folder.join("guarded"), "symbolic link"),
        ("/proc/self/ns/net".into(), "symbolic link"),
        (unsafe_folder.join("file"), "can change the folder /run/guarded/unsafe"),
        (folder.join("file"), "not a namespace"),
        ("run/netns/guarded".into(), "absolute"),
        ("/run/../run/netns/guarded".into(), "'..'"),
        ("/".into(), "absolute"),
        ("/run/netns/missing".into(), "No such file"),
    ] {
        let error = Namespace::open_secure_path(&path).err().ok_or("it is refused")?;
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        equal(&format!("{}: {cause}", path.display()), cause.contains(reason), true)?;
    }
    fs::remove_dir_all(folder)?;
    Ok(())
}

fn other_kind_of_namespace_is_refused() -> Result<(), Failed> {
    let namespace = Namespace::open("/proc/self/ns/uts")?;
    let thread = NamespaceThread::start()?;
    let entered = runtime()?.block_on(thread.call(&namespace, |_| ()));
    let error = format!("{:?}", entered.err());
    equal(&error, error.contains("of another kind"), true)
}

fn entered_by_descriptor() -> Result<(), Failed> {
    let wired = ConnectedPods::new("descriptor")?;
    let inside = command(&wired.pod, ADDRESSES)?;
    let current = wired.pod.run(Namespace::current)??;
    let reopened = Namespace::open(current.path())?;
    equal("by path", command(&reopened, ADDRESSES)?, inside)
}

fn deleting_frees_the_name() -> Result<(), Failed> {
    let path = Path::new("/run/netns/deleted");
    Namespace::create_named("deleted")?.delete()?;
    equal("the file is there", path.exists(), false)?;
    Namespace::create_named("deleted")?;
    equal("the file is there", path.exists(), true)
}

fn existing_name_is_refused() -> Result<(), Failed> {
    let _holder = isolated_namespace("taken")?;
    let again = Namespace::create_named("taken");
    equal("refused", matches!(again, Err(InterceptionError::Namespace { .. })), true)
}

fn route_uses_its_gateway() -> Result<(), Failed> {
    let wired = ConnectedPods::new("routes")?;
    runtime()?.block_on(async {
        wired.pod.add_route("192.0.2.0/24".parse()?, "10.0.0.2".parse()?).await?;
        wired.pod.add_route("2001:db8::/32".parse()?, "fd00::2".parse()?).await?;
        let mixed = wired.pod.add_route("2001:db8::/32".parse()?, "10.0.0.2".parse()?).await;
        equal("mixed families are refused", mixed.is_err(), true)
    })?;
    for (line, gateway) in [
        ("ip -4 route show 192.0.2.0/24", "via 10.0.0.2 dev eth0"),
        ("ip -4 route show default", "via 10.0.0.2 dev eth0"),
        ("ip -6 route show 2001:db8::/32", "via fd00::2 dev eth0"),
        ("ip -6 route show default", "via fd00::2 dev eth0"),
    ] {
        equal(line, command(&wired.pod, line)?.contains(gateway), true)?;
    }
    Ok(())
}

/// The namespaces that the threads of this process are in.
fn namespaces_of_threads() -> Result<BTreeSet<String>, Failed> {
    let mut found = BTreeSet::new();
    for task in fs::read_dir("/proc/self/task")? {
        // A thread may end during the loop.
        if let Ok(link) = fs::read_link(task?.path().join("ns/net")) {
            found.insert(link.to_string_lossy().into_owned());
        }
    }
    Ok(found)
}

async fn interception(access: &NamespaceAccess) -> Result<Interception, Failed> {
    let prepared = Interception::prepare(access, &settings(""), PORTS).await?;
    prepared.ok_or_else(|| "the profile has rules".into())
}

/// Lists rules as other programs see them, without counters.
fn rules_in(namespace: &Namespace) -> Result<[String; 3], Failed> {
    let nftables = command(namespace, "nft --stateless list ruleset")?;
    Ok([nftables, command(namespace, "ip -4 rule")?, command(namespace, "ip -6 rule")?])
}

fn one_thread_installs_rules_everywhere() -> Result<(), Failed> {
    /// The number of pods on a node.
    const NAMESPACES: usize = 250;
    /// One in this many namespaces gets rules, because installing them takes most of the time.
    const WITH_RULES: usize = 25;
    let thread = NamespaceThread::start()?;
    let (mut pods, mut threads) = (Vec::new(), BTreeSet::new());
    let mut installed: Vec<Interception> = Vec::new();
    for number in 0..NAMESPACES {
        let namespace = isolated_namespace(&format!("many-{number}"))?;
        let access = NamespaceAccess::new(namespace.clone(), thread.clone());
        let id = namespace.id();
        let operation = thread.run(&namespace, async |entered| {
            (format!("{:?}", thread::current().id()), entered.namespace().id())
        });
        let (on, inside) = runtime()?.block_on(operation)?;
        equal("the namespace", inside, id)?;
        threads.insert(on);
        if number % WITH_RULES == 0 {
            installed.push(runtime()?.block_on(async {
                let interception = interception(&access).await?;
                interception.install().await?;
                Ok::<_, Failed>(interception)
            })?);
        }
        pods.push((namespace, access));
    }
    equal("threads that ran operations", threads.len(), 1)?;
    let plans: BTreeSet<_> = installed.iter().map(|one| std::ptr::from_ref(one.plan())).collect();
    equal("plans of equal settings", plans.len(), 1)?;
    for interception in &installed {
        equal("difference", runtime()?.block_on(interception.verify())?, None)?;
    }
    // The threads that created the namespaces may end a little later.
    let deadline = Instant::now() + DEADLINE;
    loop {
        let occupied = namespaces_of_threads()?;
        let idle = |pod: &&(Namespace, _)| !occupied.contains(&pod.0.id().to_string());
        let idle = pods.iter().filter(idle).count();
        if idle == NAMESPACES {
            break;
        }
        if Instant::now() > deadline {
            return Err(format!("only {idle} namespaces have no thread").into());
        }
        thread::yield_now();
    }
    for (number, (namespace, _)) in pods.iter().enumerate() {
        // Each of these checks runs a program.
        if number % WITH_RULES < 2 {
            let installed = command(namespace, "nft list tables")?.contains("underpass");
            equal("the rules are installed", installed, number % WITH_RULES == 0)?;
        }
    }
    pods.into_iter().try_for_each(|(namespace, _)| Ok(namespace.delete()?))
}

fn rules_are_managed_from_outside() -> Result<(), Failed> {
    let (pod, neighbour) =
        (isolated_namespace("outside-pod")?, isolated_namespace("outside-neighbour")?);
    let before = [rules_in(&pod)?, rules_in(&neighbour)?];
    let thread = NamespaceThread::start()?;
    let [access, other] =
        [&pod, &neighbour].map(|one| NamespaceAccess::new(one.clone(), thread.clone()));
    runtime()?.block_on(async {
        let rules = interception(&access).await?;
        let of_neighbour = interception(&other).await?;
        let mut unchanged = of_neighbour.changes().await?;
        let mut changes = rules.changes().await?;
        rules.install().await?;
        timeout(DEADLINE, changes.next()).await??;
        equal("the difference", rules.verify().await?, None)?;
        equal("the neighbour's difference", of_neighbour.verify().await?.is_some(), true)?;
        equal("the neighbour's counters", of_neighbour.counters().await?.len(), 0)?;
        command(&pod, "nft flush ruleset")?;
        equal("the difference", rules.verify().await?.is_some(), true)?;
        rules.repair().await?;
        equal("the difference", rules.verify().await?, None)?;
        equal("the neighbour's rules", rules_in(&neighbour)?, before[1].clone())?;
        let result = timeout(Duration::ZERO, unchanged.next()).await;
        equal("a change at the neighbour", result.is_ok(), false)?;
        Ok::<_, Failed>(rules.remove().await?)
    })?;
    equal("the remaining rules", [rules_in(&pod)?, rules_in(&neighbour)?], before)
}

fn deleted_namespace_ends_with_last_handle() -> Result<(), Failed> {
    let ConnectedPods { pod, remote } = ConnectedPods::new("gone")?;
    let thread = NamespaceThread::start()?;
    let access = NamespaceAccess::new(pod.clone(), thread.clone());
    let rules = runtime()?.block_on(async {
        let rules = interception(&access).await?;
        rules.install().await?;
        let changes = rules.changes().await?;
        drop(changes);
        Ok::<_, Failed>(rules)
    })?;
    pod.delete()?;
    let is_linked = || Ok::<_, Failed>(command(&remote, "ip -o link")?.contains("eth0"));
    equal("its end of the link, while handles are held", is_linked()?, true)?;
    drop((rules, access));
    // The kernel removes a namespace and its interfaces in the background.
    let deadline = Instant::now() + DEADLINE;
    while is_linked()? {
        equal("the namespace is there", Instant::now() < deadline, true)?;
    }
    // The thread continues for other namespaces.
    let here = Namespace::current()?;
    let inside = thread.run(&here, async |entered| entered.namespace().id());
    equal("the next operation", runtime()?.block_on(inside)?, here.id())
}

fn sandbox_requires_a_single_thread() -> Result<(), Failed> {
    // `run` starts another thread, so the process has at least two.
    let entered = isolated_namespace("threads")?.run(enter_sandbox)?;
    let remedy = match entered {
        Err(InterceptionError::Sandbox { remedy, .. }) => Some(remedy),
        _ => None,
    };
    equal("the remedy", remedy, Some(SandboxRemedy::SingleThread))
}
