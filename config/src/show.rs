//! Settings as the YAML that would say the same: what `underpass config show` prints.
//!
//! Paths of secrets are shown, their contents never: settings do not hold them.

use std::fmt;
use std::time::Duration;

use crate::settings::{Ipv6, LogFormat, OnExit, Profile, Settings};

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let workload = &self.workload;
        writeln!(
            f,
            "workload: {{name: {}, namespace: {}, serviceAccount: {}, trustDomain: {}}}",
            workload.name, workload.namespace, workload.service_account, workload.trust_domain
        )?;
        if let Some(file) = &self.mesh_file {
            writeln!(f, "mesh: {{file: {:?}}}", file.display().to_string())?;
        }
        if let Some(files) = &self.identity {
            writeln!(
                f,
                "identity: {{certificate: {:?}, key: {:?}, roots: {:?}}}",
                files.certificate.display().to_string(),
                files.key.display().to_string(),
                files.roots.display().to_string()
            )?;
        }
        self.fmt_interception(f)?;
        self.fmt_proxy(f)?;
        writeln!(f, "metrics: {{address: \"{}\"}}", self.metrics)?;
        writeln!(f, "readiness: {{address: \"{}\"}}", self.readiness)?;
        let format = match self.logging.format {
            LogFormat::Plain => "plain",
            LogFormat::Json => "json",
        };
        writeln!(f, "logging: {{filter: {:?}, format: {format}}}", self.logging.filter)
    }
}

impl Settings {
    fn fmt_interception(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let profile = match self.interception.profile {
            Profile::Ambient => "ambient",
            Profile::None => "none",
        };
        let ipv6 = match self.interception.ipv6 {
            Ipv6::Capture => "capture",
            Ipv6::Bypass => "bypass",
        };
        let on_exit = match self.interception.on_exit {
            OnExit::Keep => "keep",
            OnExit::Remove => "remove",
        };
        let allow_host = self.interception.allow_host;
        writeln!(
            f,
            "interception: {{profile: {profile}, ipv6: {ipv6}, on_exit: {on_exit}, allow_host: {allow_host}}}"
        )
    }

    fn fmt_proxy(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let proxy = &self.proxy;
        let workers = proxy.workers.map_or_else(|| "auto".to_owned(), |n| n.to_string());
        writeln!(
            f,
            "proxy: {{outbound_port: {}, inbound_port: {}, hbone_port: {}, workers: {workers}}}",
            proxy.outbound_port, proxy.inbound_port, proxy.hbone_port
        )?;
        let t = &self.timeouts;
        writeln!(
            f,
            "timeouts: {{connect: {}, handshake: {}, reply: {}, drain: {}, pool_idle: {}}}",
            Millis(t.connect),
            Millis(t.handshake),
            Millis(t.reply),
            Millis(t.drain),
            Millis(t.pool_idle)
        )
    }
}

/// A duration in the largest unit that a setting can have and that loses nothing.
struct Millis(Duration);

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_millis() {
            millis if millis % 1000 == 0 => write!(f, "{}s", millis / 1000),
            millis => write!(f, "{millis}ms"),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::Sources;

    #[test]
    fn what_is_shown_can_be_read_again_and_says_the_same() {
        let flags = [
            "mesh.file=/etc/underpass/mesh file.yaml",
            "identity={certificate: /c.pem, key: /c.key, roots: /r.pem}",
            "interception={profile: none, ipv6: bypass, on_exit: remove, allow_host: true}",
            "proxy.workers=3",
            "timeouts={connect: 250ms, pool_idle: 2h}",
            "metrics.address=127.0.0.1:1",
            "logging={filter: 'info,access=off', format: json}",
        ];
        let first = Sources { flags: flags.map(str::to_owned).into(), ..Sources::default() }
            .load()
            .unwrap();
        let shown = first.to_string();
        let again: Vec<String> = shown.lines().map(|line| line.replacen(": ", "=", 1)).collect();
        let second = Sources { flags: again, ..Sources::default() }.load().unwrap();
        assert_eq!(first, second, "{shown}");
    }
}
