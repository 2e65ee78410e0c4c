//! Classifies the effect of a foreign rule on packets that underpass would capture, by the rule's
//! target or text.

use crate::plan::{MARK_MASK, PROXY_MARK};

/// The effect of a foreign rule on packets that underpass would capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effect {
    /// Sets the proxy's mark, so that matching packets are not captured.
    SetsProxyMark,
    /// Sets or copies a packet or connection mark.
    Marks,
    /// Changes the destination before underpass's rules do.
    Redirects,
    /// Disables connection tracking or changes the conntrack zone, so that packets cannot be
    /// redirected.
    Untracks,
    /// Passes packets to another program or socket.
    Diverts,
    /// Ends the chain before the jump to underpass's chain.
    Accepts,
    /// Selects a route: an ip rule with a lower priority number than underpass's.
    Routes,
}

impl Effect {
    /// Describes the effect as a verb phrase.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SetsProxyMark => "sets the proxy's mark",
            Self::Marks => "changes marks",
            Self::Redirects => "changes the destination",
            Self::Untracks => "changes connection tracking",
            Self::Diverts => "diverts packets",
            Self::Accepts => "ends the chain before underpass' rules",
            Self::Routes => "selects a route before underpass' ip rule",
        }
    }
}

/// Classifies a rule by its target and `text`. `own` is true if underpass's rules are in the same
/// tables.
pub(crate) fn effect_of_target(target: &str, text: &str, own: bool) -> Option<Effect> {
    match target {
        "MARK" | "CONNMARK" if sets_proxy_mark(text) => Some(Effect::SetsProxyMark),
        "MARK" | "CONNMARK" => Some(Effect::Marks),
        "REDIRECT" | "DNAT" | "NETMAP" => Some(Effect::Redirects),
        "NOTRACK" | "CT" => Some(Effect::Untracks),
        "TPROXY" | "NFQUEUE" => Some(Effect::Diverts),
        "ACCEPT" if own => Some(Effect::Accepts),
        _ => None,
    }
}

/// Returns true if a rule sets the packet mark to the proxy's mark: `meta mark set 0x539`,
/// `--set-xmark 0x539/0xfff`.
pub(crate) fn sets_proxy_mark(text: &str) -> bool {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.windows(2).any(|pair| {
        let [option, value] = pair else { return false };
        let sets = ["set", "--set-mark", "--set-xmark"].contains(option);
        sets && is_proxy_mark(value)
    })
}

fn is_proxy_mark(value: &str) -> bool {
    let value = value.split('/').next().unwrap_or_default();
    let number = match value.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => value.parse(),
    };
    number.is_ok_and(|mark| mark & MARK_MASK == PROXY_MARK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxy_mark_is_recognized_in_nft_and_iptables_notation() {
        for text in [
            "meta mark set 0x00000539",
            "-j MARK --set-xmark 0x4539/0xffffffff",
            "meta mark set 1337",
        ] {
            assert!(sets_proxy_mark(text), "{text}");
        }
        for text in ["meta mark set 0x00000111", "meta mark 0x539 accept", "--set-xmark nonsense"] {
            assert!(!sets_proxy_mark(text), "{text}");
        }
    }
}
