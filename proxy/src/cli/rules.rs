//! `underpass rules`: manages interception rules in the current network namespace.
//!
//! `rules/options.rs` defines the options that all commands share. `rules/sourced_settings.rs`
//! selects between given settings and those of the running proxy.

mod options;
mod sourced_settings;
mod verify;

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::time::Duration;

use clap::ValueEnum;
use serde_json::{Value, json};
use underpass_config::{InterceptionSettings, Settings};
use underpass_interception::{
    Difference, Explanation, Family, Interception, LineStatus, NamespaceAccess, Ports, Protocol,
    RemovalScope, RuleCounter, RulePlan, Sender, ipv6_available, remove_everything,
};

use self::options::RuleOptions;
use self::sourced_settings::SourcedSettings;
use super::{print, single_threaded_runtime};
use crate::process::command_error::CommandError;
use crate::process::instance;
use crate::rules::owner::role;
use crate::rules::reconciler::{Event, RuleReconciler};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Print the rules without installing them; needs no privilege
    #[command(
        after_help = "Example:\n  underpass rules render --profile sidecar --format iptables --outbound-exclude-ports 5432"
    )]
    Render {
        #[command(flatten)]
        options: RuleOptions,
        /// The output format
        #[arg(long, short = 'o', visible_alias = "output", value_enum, default_value_t = RenderFormat::Nft)]
        format: RenderFormat,
    },
    /// Install the rules, like an init container; without a proxy, caught connections are refused
    #[command(
        after_help = "Example:\n  ip netns exec pod-a underpass rules install --profile sidecar"
    )]
    Install {
        #[command(flatten)]
        options: RuleOptions,
        /// Install even if a running proxy owns the rules
        #[arg(long)]
        force: bool,
        /// The output format
        #[arg(long, short = 'o', visible_alias = "format", value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Compare the rules in the kernel with the settings given, or else with the running proxy; on
    /// a difference or a bypass, print it and exit with code 3
    #[command(
        after_help = "Example:\n  ip netns exec pod-a underpass rules verify\n  ip netns exec pod-a underpass rules verify --config underpass.yaml"
    )]
    Verify {
        #[command(flatten)]
        options: RuleOptions,
        /// The output format
        #[arg(long, short = 'o', visible_alias = "format", value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Remove every rule, ip rule, route and address of underpass, installed by any backend and
    /// profile
    #[command(after_help = "Example:\n  ip netns exec pod-a underpass rules remove")]
    Remove {
        /// Also remove chains, tables and ip rules of Istio and OSM, which underpass did not
        /// install
        #[arg(long)]
        other_meshes: bool,
        /// Allow the host's own network namespace
        #[arg(long)]
        allow_host: bool,
        /// The output format
        #[arg(long, short = 'o', visible_alias = "format", value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Show the path of each kind of traffic, or of one packet, through the rules, with live
    /// counters
    #[command(
        after_help = "Example:\n  ip netns exec pod-a underpass rules explain --profile sidecar --from app --to 10.0.0.5:443"
    )]
    Explain {
        #[command(flatten)]
        options: RuleOptions,
        /// The sender of the packet: the workload, the proxy, another pod, or the kubelet
        #[arg(long, value_name = "app|proxy|remote|probe", value_parser = sender, requires = "to")]
        from: Option<Sender>,
        /// The destination of the packet
        #[arg(long, value_name = "ADDRESS:PORT", requires = "from")]
        to: Option<SocketAddr>,
        /// The protocol of the packet
        #[arg(long, value_name = "tcp|udp", value_parser = protocol, default_value = "tcp")]
        protocol: Protocol,
        /// The output format
        #[arg(long, short = 'o', visible_alias = "output", value_enum, default_value_t = ExplainFormat::Text)]
        format: ExplainFormat,
    },
    /// Watch the rules and repair changes by other programs within milliseconds, until a stop
    /// signal
    #[command(
        after_help = "Example:\n  ip netns exec pod-a underpass rules watch --config underpass.yaml"
    )]
    Watch {
        #[command(flatten)]
        options: RuleOptions,
        /// Install even if a running proxy owns the rules
        #[arg(long)]
        force: bool,
        /// The format of events
        #[arg(long, short = 'o', visible_alias = "format", value_enum, default_value_t = Output::Text)]
        output: Output,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum RenderFormat {
    /// For `nft -f -`
    Nft,
    /// For `iptables-restore --noflush`
    Iptables,
    /// For `ip6tables-restore --noflush`
    Ip6tables,
    /// JSON: every rule with its id, reason and origin
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    /// Human-readable text
    Text,
    /// JSON
    Json,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum ExplainFormat {
    /// Human-readable text
    Text,
    /// JSON
    Json,
    /// A Mermaid diagram
    Mermaid,
}

pub(super) fn run(command: Command) -> Result<(), CommandError> {
    match command {
        Command::Render { options, format } => render(&options.load()?, format),
        Command::Install { options, force, output } => {
            block_on(install(options.load()?, force, output))
        }
        Command::Verify { options, output } => block_on(verify::run(options, output)),
        Command::Remove { other_meshes, allow_host, output } => {
            let scope = if other_meshes { RemovalScope::OtherMeshes } else { RemovalScope::Own };
            block_on(remove(scope, allow_host, output))
        }
        Command::Explain { options, from, to, protocol, format } => {
            let packet = from.zip(to).map(|(from, to)| (from, protocol, to));
            block_on(explain(options, packet, format))
        }
        Command::Watch { options, force, output } => {
            block_on(watch(options.load()?, force, output))
        }
    }
}

fn block_on(work: impl Future<Output = Result<(), CommandError>>) -> Result<(), CommandError> {
    single_threaded_runtime()?.block_on(work)
}

fn render(settings: &Settings, format: RenderFormat) -> Result<(), CommandError> {
    // The output may be for another namespace, so it does not depend on the current one.
    let plan = RulePlan::new(&settings.interception, Ports::of(settings), true);
    match format {
        RenderFormat::Nft => print(&format!("{plan:#}")),
        RenderFormat::Iptables => print(&plan.iptables(Family::V4)),
        RenderFormat::Ip6tables => print(&plan.iptables(Family::V6)),
        RenderFormat::Json => print_json(&plan.json()),
    }
}

async fn install(settings: Settings, force: bool, output: Output) -> Result<(), CommandError> {
    refuse_beside_proxy(force).await?;
    let interception = prepare(&settings).await?;
    let leftovers = interception.leftovers().await?;
    for leftover in &leftovers {
        writeln!(io::stderr(), "warning: {leftover}").ok();
    }
    let role = role(settings.interception.profile, Ports::of(&settings));
    let interception = interception.owned_by(format!("underpass rules install {role}"));
    interception.install().await?;
    let (backend, rules) = (interception.backend().to_string(), interception.plan().rules().len());
    let profile = settings.interception.profile.to_string();
    match output {
        Output::Text => {
            print(&format!("installed {rules} rules of the {profile} profile with {backend}\n"))
        }
        Output::Json => {
            let leftovers: Vec<_> = leftovers.iter().map(ToString::to_string).collect();
            print_json(&json!({
                "profile": profile, "backend": backend, "rules": rules, "leftovers": leftovers,
            }))
        }
    }
}

/// Refuses to replace the rules of a running proxy, which would install its own again.
async fn refuse_beside_proxy(force: bool) -> Result<(), CommandError> {
    match instance::running().await? {
        Some(running) if running.installs && !force => {
            Err(CommandError::KeptByProxy(Box::new(running)))
        }
        _ => Ok(()),
    }
}

/// `[{"location": …, "missing": [rule…], "unexpected": [rule…]}]`
fn differences(difference: &Difference) -> Vec<Value> {
    let sections = difference.sections().iter().map(|section| {
        let with = |status: LineStatus| -> Vec<&str> {
            let lines = section.lines.iter().filter(|line| line.status == status);
            lines.map(|line| line.text.as_str()).collect()
        };
        json!({
            "location": section.location,
            "missing": with(LineStatus::Missing),
            "unexpected": with(LineStatus::Unexpected),
        })
    });
    sections.collect()
}

async fn remove(scope: RemovalScope, allow_host: bool, output: Output) -> Result<(), CommandError> {
    let access = NamespaceAccess::current().map_err(CommandError::start)?;
    let removed = remove_everything(&access, scope, allow_host).await?;
    if let Ok(Some(running)) = instance::running().await
        && running.installs
        && running.settings.interception.repair
    {
        writeln!(io::stderr(), "warning: the running proxy ({running}) restores its rules").ok();
    }
    match output {
        Output::Text if removed => print("removed\n"),
        Output::Text => print("there was nothing to remove\n"),
        Output::Json => print_json(&json!({ "removed": removed })),
    }
}

async fn explain(
    options: RuleOptions,
    packet: Option<(Sender, Protocol, SocketAddr)>,
    format: ExplainFormat,
) -> Result<(), CommandError> {
    let sourced = SourcedSettings::select(options).await?;
    let (settings, ports) = (&sourced.settings.interception, Ports::of(&sourced.settings));
    let access = NamespaceAccess::current().map_err(CommandError::start)?;
    let environment = access.environment().await?;
    let counters = counters(&access, settings, ports).await;
    let explanation =
        Explanation::new(settings, ports, ipv6_available(), &environment, counters.as_deref());
    let text = match packet {
        None => match format {
            ExplainFormat::Text => explanation.to_string(),
            ExplainFormat::Json => return print_json(&sourced.with(explanation.json())),
            ExplainFormat::Mermaid => explanation.mermaid(),
        },
        Some((sender, protocol, to)) => {
            let packet = explanation.packet(sender, protocol, to);
            match format {
                ExplainFormat::Text => packet.to_string(),
                ExplainFormat::Json => return print_json(&sourced.with(packet.json())),
                ExplainFormat::Mermaid => packet.mermaid(),
            }
        }
    };
    print(&text)
}

/// The live counters; `None` without rules or without the privilege to read them.
async fn counters(
    access: &NamespaceAccess,
    settings: &InterceptionSettings,
    ports: Ports,
) -> Option<Vec<RuleCounter>> {
    let interception = Interception::prepare(access, settings, ports).await.ok()??;
    let counters = interception.counters().await.ok()?;
    (!counters.is_empty()).then_some(counters)
}

async fn watch(settings: Settings, force: bool, output: Output) -> Result<(), CommandError> {
    refuse_beside_proxy(force).await?;
    let interception = prepare(&settings).await?;
    let mut stop = crate::process::stop_signal::StopSignal::new(false)?;
    let mut reconciler = RuleReconciler::new(interception).await?;
    let access = reconciler.access();
    let settings = tokio::sync::watch::Sender::new(settings.interception);
    let mut settings = settings.subscribe();
    loop {
        let event = tokio::select! {
            event = reconciler.next(&mut settings) => event,
            _ = stop.wait() => {
                access.finish().await;
                return Ok(());
            }
        };
        report(&event, output)?;
        if let Event::Failed { error, .. } = event {
            return Err(error.into());
        }
    }
}

fn report(event: &Event, output: Output) -> Result<(), CommandError> {
    let (word, difference, took) = match event {
        Event::Repaired { difference, took, .. } => ("repaired", difference, Some(took)),
        Event::Fight { difference } => {
            ("fight: traffic is blocked until the other program stops", difference, None)
        }
        Event::Intact | Event::Followed { .. } | Event::Failed { .. } => return Ok(()),
    };
    if output == Output::Json {
        return print(&format!(
            "{}\n",
            json!({
                "event": word,
                "seconds": took.map(Duration::as_secs_f64),
                "differences": differences(difference),
            })
        ));
    }
    let took = took.map(|took| format!(" in {took:?}")).unwrap_or_default();
    print(&format!("{word}{took}:\n{difference}"))
}

async fn prepare(settings: &Settings) -> Result<Interception, CommandError> {
    let access = NamespaceAccess::current().map_err(CommandError::start)?;
    let ports = Ports::of(settings);
    let prepared = Interception::prepare(&access, &settings.interception, ports).await?;
    prepared.ok_or(CommandError::NoRules)
}

fn print_json(value: &Value) -> Result<(), CommandError> {
    print(&format!("{value:#}\n"))
}

fn sender(word: &str) -> Result<Sender, String> {
    let found = Sender::ALL.into_iter().find(|sender| sender.name() == word);
    found.ok_or_else(|| format!("must be one of {}", Sender::ALL.map(Sender::name).join(", ")))
}

fn protocol(word: &str) -> Result<Protocol, String> {
    match word {
        "tcp" => Ok(Protocol::Tcp),
        "udp" => Ok(Protocol::Udp),
        _ => Err("must be tcp or udp".to_owned()),
    }
}
