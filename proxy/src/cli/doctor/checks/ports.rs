//! The ports of the proxy: whether another program listens on one of them.

use std::net::SocketAddr;

use underpass_interception::{ListenerTransport, ListeningSocket, SocketOwner};

use crate::cli::doctor::check::{Category, Check, Finding, Info, Outcome, at_once};
use crate::cli::doctor::subject::Subject;
use crate::traffic::listeners::{ListenAddress, addresses};

/// The ports of the listeners.
pub(super) struct Free;

impl Check for Free {
    fn info(&self) -> Info {
        Info::proxy("ports-free", Category::Ports)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        at_once(finding(&addresses(&subject.settings), &subject.listening, &subject.processes()))
    }
}

/// `own`: the processes of the running proxy. Without one, no socket is the proxy's.
fn finding(wanted: &[ListenAddress], sockets: &[ListeningSocket], own: &[u32]) -> Finding {
    let is_own = |ListeningSocket { owners, .. }: &ListeningSocket| match owners.as_slice() {
        [] => !own.is_empty(),
        // systemd (pid 1) may hold duplicates of the proxy's listeners.
        owners => owners.iter().any(|owner| own.contains(&owner.pid)),
    };
    let others: Vec<_> = sockets.iter().filter(|socket| !is_own(socket)).collect();
    let mut used = Vec::new();
    for &ListenAddress { setting, transport, address } in wanted {
        let blocking = others.iter().find(|socket| socket.blocks(transport, address));
        used.extend(blocking.map(|socket| (setting, address, *socket)));
    }
    let Some((_, first, socket)) = used.first() else {
        let message = match own.is_empty() {
            true => "no program listens on the ports of the proxy",
            false => "only the running proxy listens on its ports",
        };
        return Finding::ok(message);
    };
    let count = used.len();
    let lines = used.iter().map(|(setting, address, socket)| line(setting, *address, socket));
    let option = if socket.transport == ListenerTransport::Stream { "-ltnp" } else { "-lunp" };
    let port = first.port();
    Finding::failure(format!("ports of the proxy that other programs use: {count}"))
        .details(lines)
        .hint("stop that program, or choose another port in the settings")
        .command(format!("ss {option} 'sport = :{port}'"))
}

fn line(setting: &str, address: SocketAddr, socket: &ListeningSocket) -> String {
    let program = match socket.owners.last() {
        Some(SocketOwner { pid, name }) => format!("{name:?} (pid {pid})"),
        None => "a program that is not visible here".to_owned(),
    };
    format!("{address} ({setting}): {program} listens at {}", socket.address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::check::Level;

    #[test]
    fn port_of_another_program_is_a_failure_with_its_process() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        let transport = ListenerTransport::Stream;
        let wanted = [ListenAddress {
            setting: "proxy.hbone_port",
            transport,
            address: address("[::]:15008"),
        }];
        let socket =
            |owners| ListeningSocket { transport, address: address("0.0.0.0:15008"), owners };
        let owner = |pid, name: &str| SocketOwner { pid, name: name.to_owned() };
        let named = [socket(vec![owner(7, "nginx")])];
        assert_eq!(finding(&wanted, &[], &[]).level, Level::Ok);
        assert_eq!(finding(&wanted, &named, &[7]).level, Level::Ok);
        let other = finding(&wanted, &named, &[8]);
        let line = "[::]:15008 (proxy.hbone_port): \"nginx\" (pid 7) listens at 0.0.0.0:15008";
        assert_eq!((other.level, &*other.details), (Level::Failure, &[line.to_owned()][..]));
        assert_eq!(finding(&wanted, &[socket(vec![])], &[]).level, Level::Failure);
        assert_eq!(finding(&wanted, &[socket(vec![])], &[7]).level, Level::Ok);
        let held = [socket(vec![owner(1, "systemd"), owner(7, "underpass")])];
        assert_eq!(finding(&wanted, &held, &[7]).level, Level::Ok);
        let held = finding(&wanted, &held, &[8]);
        assert!(held.details[0].contains("\"underpass\" (pid 7)"), "{:?}", held.details);
    }
}
