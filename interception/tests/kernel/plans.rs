//! The settings that kernel tests use: for each profile the minimum and the maximum.

use libtest_mimic::Failed;
use underpass_config::{
    Backend, Dns, InboundCapture, InboundMode, InterceptionSettings, Ipv6, KubeletProbes, OnExit,
    OutboundCapture, PortRange, Profile,
};
pub(crate) fn minimal_settings(profile: Profile) -> Result<InterceptionSettings, Failed> {
    let sidecar = profile == Profile::Sidecar;
    Ok(InterceptionSettings {
        profile,
        backend: Backend::Auto,
        exact: false,
        install: true,
        repair: true,
        ipv6: Ipv6::Capture,
        on_exit: OnExit::Keep,
        allow_host: false,
        outbound: OutboundCapture::default(),
        inbound: InboundCapture::default(),
        virtual_interfaces: Vec::new(),
        proxy_uids: if profile == Profile::Ambient { Vec::new() } else { vec![0] },
        proxy_gids: if sidecar { vec![0] } else { Vec::new() },
        dns: Dns::Off,
        dns_servers: Vec::new(),
        drop_invalid: sidecar,
        ingress: false,
        kubelet_probes: KubeletProbes::Off,
        loopback_cidr: "127.0.0.1/32".parse()?,
    })
}

/// A profile with all settings that it supports.
pub(crate) fn maximal_settings(profile: Profile) -> Result<InterceptionSettings, Failed> {
    let interfaces = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
    let many_ports = (1..=20).map(PortRange::from);
    let settings = InterceptionSettings {
        outbound: OutboundCapture {
            exclude_cidrs: vec![
                "10.1.0.0/16".parse()?,
                "10.2.3.4/32".parse()?,
                "fd01::/16".parse()?,
            ],
            include_cidrs: Some(vec![
                "10.0.0.0/8".parse()?,
                "127.0.0.0/8".parse()?,
                "fd00::/8".parse()?,
            ]),
            exclude_ports: many_ports.chain(["8000-8100".parse()?]).collect(),
            include_ports: vec!["443".parse()?, "9000-9010".parse()?],
            exclude_interfaces: interfaces(&["eth1", "eth2"]),
            exclude_uids: vec![0],
            exclude_gids: vec![0],
            include_gids: Vec::new(),
        },
        inbound: InboundCapture {
            exclude_ports: vec!["22".parse()?, "2000-2010".parse()?],
            exclude_interfaces: interfaces(&["eth3"]),
            ..InboundCapture::default()
        },
        ..minimal_settings(profile)?
    };
    if profile == Profile::Osm {
        return Ok(settings);
    }
    Ok(InterceptionSettings {
        virtual_interfaces: interfaces(&["tap0", "tap1"]),
        kubelet_probes: match profile {
            Profile::Ambient => KubeletProbes::Ports(vec!["8080".parse()?, "9000-9010".parse()?]),
            _ => KubeletProbes::Off,
        },
        dns: Dns::Capture,
        // glibc and musl abbreviate the second address differently.
        dns_servers: vec!["10.0.0.10".parse()?, "::127.0.0.53".parse()?],
        ..settings
    })
}

pub(crate) fn with_tproxy(settings: InterceptionSettings) -> InterceptionSettings {
    let inbound = InboundCapture { mode: InboundMode::Tproxy, ..settings.inbound };
    InterceptionSettings { inbound, ..settings }
}

/// Settings whose plans together contain every match and every action.
pub(crate) fn all() -> Result<Vec<InterceptionSettings>, Failed> {
    let mut all = vec![
        with_tproxy(minimal_settings(Profile::Sidecar)?),
        with_tproxy(maximal_settings(Profile::Sidecar)?),
    ];
    for profile in [Profile::Ambient, Profile::Sidecar, Profile::Osm] {
        all.extend([minimal_settings(profile)?, maximal_settings(profile)?]);
    }
    let include = OutboundCapture { include_gids: vec![0], ..OutboundCapture::default() };
    all.push(InterceptionSettings { outbound: include, ..minimal_settings(Profile::Sidecar)? });
    let variations = all.clone().into_iter().flat_map(|settings| {
        let exact = InterceptionSettings { exact: true, ..settings.clone() };
        [exact, InterceptionSettings { ipv6: Ipv6::Reject, ..settings }]
    });
    let variations: Vec<_> = variations.collect();
    all.extend(variations);
    Ok(all)
}
