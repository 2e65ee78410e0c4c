//! The types that several settings share.

use std::fmt;
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;

use super::{Kind, Written};
use crate::settings::{LocalSocket, PortRange, Word};
use crate::yaml::read::Cursor;

pub(crate) const TEXT: Kind<String> = Kind {
    name: "text",
    is_list: false,
    read: |cursor, _| cursor.text().map(str::to_owned),
    write: |text| Written::scalar(text),
};

pub(crate) const PATH: Kind<PathBuf> = Kind {
    name: "path",
    is_list: false,
    read: |cursor, files| files.path(cursor),
    write: |path| Written::scalar(path.display()),
};

pub(crate) const FLAG: Kind<bool> = Kind {
    name: "`true`, `false`",
    is_list: false,
    read: |cursor, _| cursor.flag(),
    write: |flag| Written::scalar(flag),
};

pub(crate) const PORT: Kind<u16> = Kind {
    name: "port",
    is_list: false,
    read: |cursor, _| cursor.port(),
    write: |port| Written::scalar(port),
};

pub(crate) const ADDRESS: Kind<SocketAddr> = Kind {
    name: "address:port",
    is_list: false,
    read: |cursor, _| {
        cursor.parse("an address with its port, such as 127.0.0.1:15020 or \"[::]:15020\"")
    },
    write: |address| Written::scalar(address),
};

pub(crate) const COUNT: Kind<usize> = Kind {
    name: "number",
    is_list: false,
    read: |cursor, _| cursor.number(1..=usize::MAX, "a number, 1 or more"),
    write: |number| Written::scalar(number),
};

pub(crate) const COUNT_OR_OFF: Kind<Option<usize>> = Kind {
    name: "number, `off`",
    is_list: false,
    read: |cursor, _| {
        or_off(cursor, |cursor| cursor.number(1..=u32::MAX as usize, "off or a number, 1 or more"))
    },
    write: |number| off_or(*number),
};

pub(crate) const RATE_OR_OFF: Kind<Option<u32>> = Kind {
    name: COUNT_OR_OFF.name,
    is_list: false,
    read: |cursor, files| {
        let number = (COUNT_OR_OFF.read)(cursor, files)?;
        Some(number.and_then(|number| u32::try_from(number).ok()))
    },
    write: |number| off_or(*number),
};

pub(crate) const SIZE: Kind<usize> = Kind {
    name: "size",
    is_list: false,
    read: |cursor, _| cursor.size(),
    write: |bytes| {
        let units = [(1 << 30, "GiB"), (1 << 20, "MiB")];
        let unit = units.into_iter().find(|(unit, _)| bytes.is_multiple_of(*unit));
        let (unit, name) = unit.unwrap_or((1 << 10, "KiB"));
        Written::Scalar(format!("{}{name}", bytes / unit))
    },
};

pub(crate) const DURATION: Kind<Duration> = Kind {
    name: "duration",
    is_list: false,
    read: |cursor, _| cursor.duration(),
    write: |duration| Written::Scalar(in_units(*duration)),
};

pub(crate) const DURATION_OR_OFF: Kind<Option<Duration>> = Kind {
    name: "duration, `off`",
    is_list: false,
    read: |cursor, _| or_off(cursor, |cursor| cursor.duration_or_off()),
    write: |duration| off_or(duration.map(in_units)),
};

pub(crate) const CIDRS: Kind<Vec<IpNet>> =
    list("list of CIDRs", |cursor, _| given_list(cursor, cidr));

pub(crate) const NAME_SERVERS: Kind<Vec<IpAddr>> =
    list("list of addresses", |cursor, _| given_list(cursor, name_server));

pub(crate) const PORTS: Kind<Vec<PortRange>> =
    list("list of ports", |cursor, _| given_list(cursor, port_range));

pub(crate) const ADDRESS_OR_OFF: Kind<Option<SocketAddr>> = Kind {
    name: "address:port, `off`",
    is_list: false,
    read: |cursor, files| or_off(cursor, |cursor| (ADDRESS.read)(cursor, files)),
    write: |address| off_or(*address),
};

pub(crate) const LOCAL_SOCKET: Kind<LocalSocket> = Kind {
    name: "path, `auto`, `off`",
    is_list: false,
    read: |cursor, files| match cursor.text()? {
        "auto" => Some(LocalSocket::Auto),
        "off" => Some(LocalSocket::Off),
        _ => files.path(cursor).map(LocalSocket::At),
    },
    write: |socket| match socket {
        LocalSocket::Auto => Written::scalar("auto"),
        LocalSocket::At(socket) => Written::scalar(socket.display()),
        LocalSocket::Off => Written::scalar("off"),
    },
};

/// A kind for one word of a fixed set.
pub(crate) const fn word<T: Word>(name: &'static str) -> Kind<T> {
    Kind {
        name,
        is_list: false,
        read: |cursor, _| cursor.one_of(T::WORDS),
        write: |word| Written::scalar(word.word()),
    }
}

/// A kind for a list of items, which `read` parses.
pub(crate) const fn list<T: ToString>(
    name: &'static str,
    read: fn(Cursor<'_>, super::Files<'_>) -> Option<Vec<T>>,
) -> Kind<Vec<T>> {
    Kind { name, is_list: true, read, write: |items| Written::list(items) }
}

/// A kind for a list of included items; `None` means all. An empty list counts as absent, and a
/// special word means an empty selection.
pub(crate) const fn included<T: ToString>(
    name: &'static str,
    read: fn(Cursor<'_>, super::Files<'_>) -> Option<Option<Vec<T>>>,
) -> Kind<Option<Vec<T>>> {
    let write: fn(&Option<Vec<T>>) -> Written = |items| match items.as_deref() {
        None => Written::scalar("*"),
        Some([]) => Written::scalar("none"),
        Some(items) => Written::list(items),
    };
    Kind { name, is_list: true, read, write }
}

/// Reads the items of the list in the document.
pub(crate) fn given_list<T: Clone + Eq + Hash>(
    cursor: Cursor<'_>,
    read: impl Fn(&str) -> Result<T, String>,
) -> Option<Vec<T>> {
    cursor.is_given().then(|| cursor.list(read))
}

/// Reads the value in the document for [`included`].
pub(crate) fn given_included<T: Clone + Eq + Hash>(
    cursor: Cursor<'_>,
    read: impl Fn(&str) -> Result<T, String>,
) -> Option<Option<Vec<T>>> {
    match () {
        () if cursor.is_word("none") => Some(Some(Vec::new())),
        () if cursor.is_word("*") => Some(None),
        () if !cursor.is_given() || cursor.is_empty_list() => None,
        () => Some(Some(cursor.list(read))),
    }
}

/// Parses `off` as `None`.
fn or_off<T>(cursor: Cursor<'_>, read: impl Fn(Cursor<'_>) -> Option<T>) -> Option<Option<T>> {
    match cursor.text()? {
        "off" => Some(None),
        _ => read(cursor).map(Some),
    }
}

fn off_or(value: Option<impl ToString>) -> Written {
    value.map_or_else(|| Written::scalar("off"), Written::scalar)
}

/// Prints a duration in the largest unit that represents it exactly.
fn in_units(duration: Duration) -> String {
    let millis = duration.as_millis();
    let units = [(3_600_000, "h"), (60_000, "m"), (1000, "s")];
    let unit = units.into_iter().find(|(unit, _)| millis.is_multiple_of(*unit));
    let (unit, name) = unit.unwrap_or((1, "ms"));
    format!("{}{name}", millis / unit)
}

pub(crate) fn cidr(text: &str) -> Result<IpNet, String> {
    refuse_wildcards(text)?;
    crate::cidr::parse(text).ok_or_else(|| {
        "must be an address or a CIDR, such as 10.0.0.0/8, 10.1.2.3 or fd00::/8".to_owned()
    })
}

pub(crate) fn name_server(text: &str) -> Result<IpAddr, String> {
    let address = text.parse::<IpAddr>().map(|address| address.to_canonical());
    address.map_err(|_| "must be the address of a DNS server, such as 10.96.0.10".to_owned())
}

pub(crate) fn port_range(text: &str) -> Result<PortRange, String> {
    refuse_wildcards(text)?;
    parsed(text)
}

/// Reads an item of a list whose error says what it must be.
pub(crate) fn parsed<T>(text: &str) -> Result<T, String>
where
    T: FromStr,
    T::Err: fmt::Display,
{
    text.parse().map_err(|error: T::Err| error.to_string())
}

fn refuse_wildcards(text: &str) -> Result<(), String> {
    if matches!(text, "*" | "none") {
        return Err("is possible only as the single value of outbound.include_cidrs or inbound.include_ports"
            .to_owned());
    }
    Ok(())
}
