//! The states that `/status` shows. In JSON they are in snake case, in text with spaces.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Declares an enum whose first variant is the default, with its text.
macro_rules! states {
    ($(#[$doc:meta])* $name:ident { $(#[$first_doc:meta])* $first:ident = $first_text:literal,
        $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub(crate) enum $name {
            $(#[$first_doc])*
            #[default]
            $first,
            $($(#[$variant_doc])* $variant,)*
        }

        impl $name {
            pub(crate) const fn text(self) -> &'static str {
                match self {
                    Self::$first => $first_text,
                    $(Self::$variant => $text,)*
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.text())
            }
        }
    };
}

states! {
    /// The part of the proxy or of the host that a problem or a notice concerns.
    Part {
        Readiness = "readiness",
        Certificate = "certificate",
        Rules = "rules",
        ControlPlane = "control plane",
        Mesh = "mesh",
        Pod = "pod",
        Workers = "workers",
        Conntrack = "conntrack",
        /// The program file.
        Program = "program",
        Ipv6 = "ipv6",
        Log = "log",
    }
}

states! {
    /// The state of a workload's certificate.
    CertificateState {
        /// The first one is not issued yet.
        Awaited = "awaited",
        Valid = "valid",
        Expired = "expired",
    }
}

states! {
    /// Whether the interception rules are installed.
    Installation {
        NotInstalled = "not installed",
        /// Installed, and watched for changes.
        Verified = "verified",
        /// Installed, and not watched.
        Installed = "installed",
        /// Another program has changed them.
        Changed = "changed",
        ManagedByAnotherProgram = "managed by another program",
    }
}

states! {
    /// The outcome of the last self-test of the rules.
    SelfTestState {
        NotRun = "not run",
        Passed = "passed",
        /// This process can make no connection that the rules would catch.
        Skipped = "skipped",
        Failed = "failed",
    }
}

states! {
    /// The state of a pod of a node.
    PodState {
        Pending = "pending",
        Serving = "serving",
        /// It is served, and takes no new inbound connections: an operator drains it.
        Draining = "draining",
        Exempt = "exempt",
        Failed = "failed",
        Leaving = "leaving",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_has_snake_case_in_json_and_spaces_in_text() {
        let state = Installation::ManagedByAnotherProgram;
        assert_eq!(state.to_string(), "managed by another program");
        let json = serde_json::to_string(&state).unwrap();
        assert_eq!(json, "\"managed_by_another_program\"");
        assert_eq!(serde_json::from_str::<Installation>(&json).unwrap(), state);
    }
}
