//! `underpass ca`: roots and workload certificates as files.

use std::path::PathBuf;
use std::time::Duration;

use underpass_config::{SpiffeId, TrustDomain, parse_duration};
use underpass_hbone::CertificateAuthority;

use super::{CommandError, print};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Make a certificate authority: DIR/roots.pem, DIR/ca.pem, DIR/ca.key
    #[command(after_help = "Example:\n  underpass ca init --dir ca --trust-domain cluster.local")]
    Init {
        /// Where it is kept; made if it is not there
        #[arg(long)]
        dir: PathBuf,
        /// What it vouches for
        #[arg(long, default_value = "cluster.local")]
        trust_domain: TrustDomain,
    },
    /// Issue a workload's certificate: PREFIX.pem (leaf, then chain) and PREFIX.key
    #[command(
        after_help = "Example:\n  underpass ca issue --dir ca --spiffe-id spiffe://cluster.local/ns/default/sa/web --out web"
    )]
    Issue {
        /// Where the certificate authority is kept
        #[arg(long)]
        dir: PathBuf,
        /// Who the workload is
        #[arg(long)]
        spiffe_id: SpiffeId,
        /// What the two files are called, without .pem and .key
        #[arg(long, value_name = "PREFIX")]
        out: PathBuf,
        /// How long the certificate is valid: 10m, 24h
        #[arg(long, default_value = "24h", value_parser = ttl)]
        ttl: Duration,
    },
}

fn ttl(text: &str) -> Result<Duration, String> {
    parse_duration(text)
        .ok_or_else(|| "must be above zero with its unit, such as 10m or 24h".to_owned())
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
    }
}
