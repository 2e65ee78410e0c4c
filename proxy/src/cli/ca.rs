//! `underpass ca`: issues and revokes certificates, as files or over Istio's CA protocol.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::net::TcpListener;
use underpass_config::{
    AccessLogSettings, FileWatcher, LogFilter, LogFormat, Logging, SpiffeId, TrustDomain,
    parse_duration,
};
use underpass_hbone::{CaServer, CaServerSettings, CertificateAuthority, Serial};
use underpass_interception::{Inotify, confine_process};

use super::{print, single_threaded_runtime};
use crate::process::command_error::CommandError;
use crate::process::stop_signal::StopSignal;
use crate::process::{logging, notify};
use crate::version::VERSION;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Create a certificate authority: DIR/roots.pem, DIR/ca.pem, DIR/ca.key
    #[command(after_help = "Example:\n  underpass ca init --dir ca --trust-domain cluster.local")]
    Init {
        /// The folder of the certificate authority; created if it does not exist
        #[arg(long)]
        dir: PathBuf,
        /// The trust domain of its certificates
        #[arg(long, default_value = "cluster.local")]
        trust_domain: TrustDomain,
    },
    /// Issue a workload's certificate: PREFIX.pem (leaf, then chain) and PREFIX.key
    #[command(
        after_help = "Example:\n  underpass ca issue --dir ca --spiffe-id spiffe://cluster.local/ns/default/sa/web --out web"
    )]
    Issue {
        /// The folder of the certificate authority
        #[arg(long)]
        dir: PathBuf,
        /// The SPIFFE id of the workload
        #[arg(long)]
        spiffe_id: SpiffeId,
        /// The common path of the two files, without .pem and .key
        #[arg(long, value_name = "PREFIX")]
        out: PathBuf,
        /// The lifetime of the certificate: a whole number and a unit (ms, s, m or h), such as 90s,
        /// 10m, 24h or 720h (30 days)
        #[arg(long, default_value = "24h", value_parser = ttl)]
        ttl: Duration,
    },
    /// Revoke certificates: add them to DIR/crl.pem (for trust.crls); without certificates,
    /// create an empty list
    #[command(after_help = "Example:\n  underpass ca revoke --dir ca web.pem")]
    Revoke {
        /// The folder of the certificate authority
        #[arg(long)]
        dir: PathBuf,
        /// Certificate files, as written by `ca issue`
        certificates: Vec<PathBuf>,
        /// A serial number, as logged by `ca serve`; may be repeated
        #[arg(long = "serial", value_name = "HEX")]
        serials: Vec<Serial>,
    },
    /// Serve certificates over Istio's CA protocol, to underpass and to ztunnel
    #[command(after_help = SERVE_EXAMPLE)]
    Serve(Serve),
}

const SERVE_EXAMPLE: &str = "Example:
  underpass ca serve --dir ca --listen 10.0.0.1:15012 --clients clients.yaml --name ca.example

clients.yaml lists the identities that each client may ask for:
  clients:
  - token: s3cret            # or token_file: FILE
    identities: [spiffe://cluster.local/ns/default/sa/web, \"spiffe://cluster.local/ns/shop/*\"]";

#[derive(Debug, clap::Args)]
pub(super) struct Serve {
    /// The folder of the certificate authority
    #[arg(long)]
    dir: PathBuf,
    /// The address to listen on; istiod's port is 15012
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: SocketAddr,
    /// The file that grants identities to clients; reloaded when it changes
    #[arg(long, value_name = "FILE")]
    clients: PathBuf,
    /// A further host name or address of this server in its certificate; may be repeated
    #[arg(long = "name", value_name = "HOST")]
    names: Vec<String>,
    /// The maximum lifetime of a certificate: a whole number and a unit (ms, s, m or h)
    #[arg(long, default_value = "24h", value_parser = ttl)]
    max_ttl: Duration,
    /// The log level and filter, such as info or warn,access=off
    #[arg(long, value_name = "FILTER", default_value = "info")]
    log: LogFilter,
    /// Stop when standard input ends, so that the process does not outlive its parent
    #[arg(long)]
    until_eof: bool,
}

fn ttl(text: &str) -> Result<Duration, String> {
    parse_duration(text)
        .ok_or_else(|| "must be a whole number above zero with its unit, which is ms, s, m or h, such as 10m or 720h (30 days)".to_owned())
}

pub(super) fn run(command: Command) -> Result<(), CommandError> {
    match command {
        Command::Init { dir, trust_domain } => {
            CertificateAuthority::init(&dir, trust_domain)?;
            let dir = dir.display();
            print(&format!(
                "{dir}/roots.pem: give it to every proxy\n{dir}/ca.key: keep it secret\n"
            ))
        }
        Command::Issue { dir, spiffe_id, out, ttl } => {
            let certificate = CertificateAuthority::open(&dir)?.issue(&spiffe_id, ttl)?;
            certificate.write(&out)?;
            let out = out.display();
            print(&format!("{out}.pem and {out}.key: {spiffe_id}\n"))
        }
        Command::Revoke { dir, certificates, serials } => {
            let revoked =
                CertificateAuthority::open(&dir)?.revoke(&dir, &certificates, &serials)?;
            let dir = dir.display();
            print(&format!(
                "{dir}/crl.pem: {revoked} revoked; give it to every proxy (trust.crls)\n"
            ))
        }
        Command::Serve(arguments) => serve(arguments),
    }
}

fn serve(arguments: Serve) -> Result<(), CommandError> {
    let Serve { dir, listen, clients, names, max_ttl, log, until_eof } = arguments;
    let _logs = logging::start(&Logging {
        filter: log,
        format: LogFormat::Plain,
        access: AccessLogSettings::default(),
    })?;
    // The memory of this process contains the CA's private key.
    confine_process().map_err(CommandError::Start)?;
    let settings = CaServerSettings { dir, clients, names, max_ttl };
    single_threaded_runtime()?.block_on(async {
        let mut stop = StopSignal::new(until_eof)?;
        let listener = TcpListener::bind(listen)
            .await
            .map_err(|source| CommandError::Listen { address: listen, source })?;
        let server = CaServer::new(settings, listener, &FileWatcher::new(Inotify::open))?;
        tracing::info!(version = VERSION, %listen, "ready");
        notify::ready();
        server
            .run(async {
                let why = stop.wait().await;
                tracing::info!(why, "stopping");
            })
            .await;
        Ok(())
    })
}
