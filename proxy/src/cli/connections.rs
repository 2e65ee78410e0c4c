//! `underpass connections`: open and recent connections of a running proxy.

pub(super) mod text;

use std::io::{self, Write as _};

use bytes::{Buf as _, BytesMut};
use http::Method;
use http_body_util::BodyExt as _;
use underpass_config::parse_duration;

use self::text::entry;
use super::admin_client::ProxyArguments;
use super::rules::Output;
use super::single_threaded_runtime;
use super::style::Style;
use crate::admin::api::connection::{DIRECTIONS, PROTOCOLS, State, Verdict};
use crate::admin::api::connections::Line;
use crate::admin::client::AdminClientError;
use crate::process::command_error::CommandError;

/// The number of connections without `--last`: about one screen.
const DEFAULT_LAST: usize = 20;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    filter: FilterArguments,
    /// Show at most this number of connections, the newest ones
    #[arg(long, value_name = "N", default_value_t = DEFAULT_LAST)]
    last: usize,
    /// Then show each connection that is opened or ends, until interrupted
    #[arg(long, short = 'f')]
    follow: bool,
    /// The output format; JSON has one value a line
    #[arg(long, short = 'o', visible_alias = "format", value_enum, default_value_t = Output::Text)]
    output: Output,
    #[command(flatten)]
    proxy: ProxyArguments,
}

/// The filter. A connection is shown if it matches every option.
#[derive(Debug, clap::Args)]
struct FilterArguments {
    /// Connections that the proxy serves for this pod: NAMESPACE/NAME, NAME or NAMESPACE/
    #[arg(long)]
    pod: Option<String>,
    /// The client: an address, a range, NAMESPACE/NAME, NAMESPACE/, NAME or a SPIFFE ID
    #[arg(long, value_name = "END")]
    from: Option<String>,
    /// The destination: as --from, or the hostname of a service
    #[arg(long, value_name = "END")]
    to: Option<String>,
    /// The port of the destination
    #[arg(long)]
    port: Option<u16>,
    /// The direction, seen from the pod
    #[arg(long, value_parser = DIRECTIONS)]
    direction: Option<String>,
    /// Whether a tunnel carries the connection
    #[arg(long, value_parser = PROTOCOLS)]
    protocol: Option<String>,
    /// The state
    #[arg(long, value_parser = State::ALL.map(State::as_str))]
    state: Option<String>,
    /// The decision
    #[arg(long, value_parser = Verdict::ALL.map(Verdict::as_str))]
    verdict: Option<String>,
    /// The reason of the access log, such as policy_denied
    #[arg(long)]
    reason: Option<String>,
    /// The policy that decided: NAMESPACE/NAME
    #[arg(long)]
    policy: Option<String>,
    /// Connections that are open, or ended within this time, such as 90s or 5m
    #[arg(long, value_name = "TIME", value_parser = duration)]
    since: Option<String>,
}

/// The text of a duration, which the proxy parses.
fn duration(text: &str) -> Result<String, &'static str> {
    parse_duration(text).map(|_| text.to_owned()).ok_or("use a time such as 90s or 5m")
}

impl Arguments {
    fn path(&self) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        let FilterArguments {
            pod,
            from,
            to,
            port,
            direction,
            protocol,
            state,
            verdict,
            reason,
            policy,
            since,
        } = &self.filter;
        for (name, value) in [
            ("pod", pod),
            ("from", from),
            ("to", to),
            ("port", &port.map(|port| port.to_string())),
            ("direction", direction),
            ("protocol", protocol),
            ("state", state),
            ("verdict", verdict),
            ("reason", reason),
            ("policy", policy),
            ("since", since),
            ("last", &Some(self.last.to_string())),
            ("follow", &self.follow.then(String::new)),
        ] {
            if let Some(value) = value {
                query.append_pair(name, value);
            }
        }
        format!("/connections?{}", query.finish())
    }
}

pub(super) fn run(arguments: Arguments) -> Result<(), CommandError> {
    single_threaded_runtime()?.block_on(show(arguments))
}

async fn show(arguments: Arguments) -> Result<(), CommandError> {
    let (path, output, follow) = (arguments.path(), arguments.output, arguments.follow);
    let mut client = arguments.proxy.connect().await?;
    let mut body = client.request(Method::GET, &path).await?.into_body();
    let (mut pending, style, mut is_empty) = (BytesMut::new(), Style::of_stdout(), true);
    while let Some(frame) = body.frame().await {
        let Ok(chunk) = frame.map_err(AdminClientError::from)?.into_data() else { continue };
        pending.extend_from_slice(&chunk);
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            write(&pending.split_to(end), output, style)?;
            pending.advance(1);
            is_empty = false;
        }
        io::stdout().flush().map_err(CommandError::Output)?;
    }
    if is_empty && output == Output::Text && !follow {
        write_all("no open or recent connection matches\n")?;
    }
    Ok(())
}

/// Writes a line of the answer.
fn write(line: &[u8], output: Output, style: Style) -> Result<(), CommandError> {
    let text = match output {
        Output::Json => format!("{}\n", String::from_utf8_lossy(line)),
        Output::Text => match serde_json::from_slice(line).map_err(AdminClientError::from)? {
            Line::Missed { missed } => {
                format!("... {missed} connections are left out: this command reads too slowly\n")
            }
            Line::Connection(connection) => entry(&connection, style),
        },
    };
    write_all(&text)
}

fn write_all(text: &str) -> Result<(), CommandError> {
    io::stdout().write_all(text.as_bytes()).map_err(CommandError::Output)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn path(line: &str) -> Result<String, clap::Error> {
        Ok(Command::try_parse_from(line.split(' '))?.arguments.path())
    }

    #[test]
    fn options_become_parameters_of_the_request() {
        assert_eq!(path("connections").unwrap(), "/connections?last=20");
        let all = "connections --pod a/b --from 10.0.0.0/8 --to c/ --port 80 --direction inbound \
                   --protocol hbone --state open --verdict denied --reason policy_denied \
                   --policy d/e --since 5m --last 3 -f";
        assert_eq!(
            path(&all.split_whitespace().collect::<Vec<_>>().join(" ")).unwrap(),
            "/connections?pod=a%2Fb&from=10.0.0.0%2F8&to=c%2F&port=80&direction=inbound&protocol=hbone\
             &state=open&verdict=denied&reason=policy_denied&policy=d%2Fe&since=5m&last=3&follow="
        );
        for wrong in ["--direction both", "--verdict no", "--port http", "--since 5"] {
            assert!(path(&format!("connections {wrong}")).is_err(), "{wrong}");
        }
    }
}
