//! Namespaces as other programs see them.

use std::path::Path;

use libtest_mimic::Failed;
use underpass_interception::{InterceptionError, Namespace, SandboxRemedy, enter_sandbox};

use crate::Case;
use crate::pod::{Wired, command, equal, lonely, runtime};

pub(crate) const CASES: &[Case] = &[
    ("a named namespace can be entered by its path and its name", entered_by_path_and_name),
    ("the current namespace can be entered by its path", entered_by_descriptor),
    ("deleting a namespace frees its name", deleting_frees_the_name),
    ("a name that is taken is refused", taken_name),
    ("routes go through the gateway they were given", routes),
    ("a sandbox cannot be entered by one of several threads", no_sandbox_for_threads),
];

/// Its addresses say which namespace a program is in.
const ADDRESSES: &str = "ip -o address show dev eth0";

fn entered_by_path_and_name() -> Result<(), Failed> {
    let wired = Wired::new("entered")?;
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

fn entered_by_descriptor() -> Result<(), Failed> {
    let wired = Wired::new("descriptor")?;
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

fn taken_name() -> Result<(), Failed> {
    let _holder = lonely("taken")?;
    let again = Namespace::create_named("taken");
    equal("refused", matches!(again, Err(InterceptionError::Namespace { .. })), true)
}

fn routes() -> Result<(), Failed> {
    let wired = Wired::new("routes")?;
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

fn no_sandbox_for_threads() -> Result<(), Failed> {
    // The thread that `run` makes is at least the second.
    let entered = lonely("threads")?.run(enter_sandbox)?;
    let remedy = match entered {
        Err(InterceptionError::Sandbox { remedy, .. }) => Some(remedy),
        _ => None,
    };
    equal("the remedy", remedy, Some(SandboxRemedy::SingleThread))
}
