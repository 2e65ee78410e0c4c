//! Captures the frames of an interface, and parses TCP segments.
//!
//! Tests and the demonstration use it to show that no plaintext leaves the pod. It skips IPv6
//! extension headers, fragments and VLANs.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket,
    sockopt,
};

/// The receive buffer in bytes. It must hold the frames between two calls of
/// [`PacketCapture::drain`].
const RECEIVE_BUFFER: usize = 64 << 20;
/// The maximum length of a frame: with segmentation offload, 64 KiB of IP and the Ethernet header.
const MAX_FRAME: usize = (64 << 10) + 64;

/// A capture of the frames that an interface sends and receives.
pub struct PacketCapture {
    socket: OwnedFd,
    interface: usize,
    frame: Vec<u8>,
}

impl PacketCapture {
    /// Starts a capture on `interface` of the current network namespace. Requires NET_RAW.
    ///
    /// # Errors
    ///
    /// The error of the kernel. ENODEV if the interface does not exist.
    pub fn open(interface: &str) -> io::Result<Self> {
        let interface = usize::try_from(if_nametoindex(interface)?).map_err(io::Error::other)?;
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?;
        // RcvBufForce ignores net.core.rmem_max, but requires a capability.
        if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER)?;
        }
        Ok(Self { socket, interface, frame: vec![0; MAX_FRAME] })
    }

    /// Returns the frames since the last call, in order. Does not wait.
    ///
    /// # Errors
    ///
    /// The error of the kernel. ENOBUFS if frames were lost.
    pub fn drain(&mut self) -> io::Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        loop {
            match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut self.frame) {
                Ok((len, from)) => {
                    let ours = from.is_some_and(|from| from.ifindex() == self.interface);
                    if let (true, Some(frame)) = (ours, self.frame.get(..len)) {
                        frames.push(frame.to_vec());
                    }
                }
                Err(Errno::EAGAIN) => return Ok(frames),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl fmt::Debug for PacketCapture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacketCapture")
            .field("socket", &self.socket)
            .field("interface", &self.interface)
            .finish_non_exhaustive()
    }
}

/// A TCP segment in an Ethernet frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpSegment<'a> {
    /// The source address and port.
    pub source: SocketAddr,
    /// The destination address and port.
    pub destination: SocketAddr,
    /// The payload without the frame's padding.
    pub payload: &'a [u8],
}

impl<'a> TcpSegment<'a> {
    /// Parses a frame. `None` if it is truncated or is not TCP over IPv4 or IPv6.
    #[must_use]
    pub fn parse(frame: &'a [u8]) -> Option<Self> {
        const ETHERNET: usize = 14;
        let packet = frame.get(ETHERNET..)?;
        let (source, destination, segment) = match frame.get(12..ETHERNET)? {
            [0x08, 0x00] => ipv4(packet)?,
            [0x86, 0xdd] => ipv6(packet)?,
            _ => return None,
        };
        // RFC 9293 section 3.1: ports, and the header length in 32-bit words.
        let header = usize::from(segment.get(12)? >> 4) * 4;
        Some(Self {
            source: SocketAddr::new(source, read_u16(segment, 0)?),
            destination: SocketAddr::new(destination, read_u16(segment, 2)?),
            payload: segment.get(header..)?,
        })
    }
}

/// The protocol number of TCP.
const TCP: u8 = 6;

/// Parses an IPv4 packet (RFC 791 section 3.1).
fn ipv4(packet: &[u8]) -> Option<(IpAddr, IpAddr, &[u8])> {
    let address = |at: usize| -> Option<IpAddr> {
        let octets: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
        Some(Ipv4Addr::from(octets).into())
    };
    let header = usize::from(packet.first()? & 0x0f) * 4;
    let total = usize::from(read_u16(packet, 2)?);
    (*packet.get(9)? == TCP).then_some(())?;
    Some((address(12)?, address(16)?, packet.get(header..total)?))
}

/// Parses an IPv6 packet (RFC 8200 section 3).
fn ipv6(packet: &[u8]) -> Option<(IpAddr, IpAddr, &[u8])> {
    const HEADER: usize = 40;
    let address = |at: usize| -> Option<IpAddr> {
        let octets: [u8; 16] = packet.get(at..at + 16)?.try_into().ok()?;
        Some(Ipv6Addr::from(octets).into())
    };
    let length = usize::from(read_u16(packet, 4)?);
    (*packet.get(6)? == TCP).then_some(())?;
    Some((address(8)?, address(24)?, packet.get(HEADER..HEADER + length)?))
}

fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    let octets: [u8; 2] = bytes.get(at..at + 2)?.try_into().ok()?;
    Some(u16::from_be_bytes(octets))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A segment from port 1000 to port 2000 with four bytes of options.
    fn segment(payload: &[u8]) -> Vec<u8> {
        let mut segment = vec![0x03, 0xe8, 0x07, 0xd0];
        segment.extend([0; 8]);
        segment.extend([0x60, 0x18, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]);
        segment.extend(payload);
        segment
    }

    fn v4_frame(payload: &[u8]) -> Vec<u8> {
        let segment = segment(payload);
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45, 0]);
        frame.extend(u16::try_from(20 + segment.len()).expect("short").to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, TCP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend(segment);
        frame
    }

    fn v6_frame(payload: &[u8]) -> Vec<u8> {
        let segment = segment(payload);
        let mut frame = vec![0; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(u16::try_from(segment.len()).expect("short").to_be_bytes());
        frame.extend([TCP, 64]);
        frame.extend(Ipv6Addr::LOCALHOST.octets());
        frame.extend(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2).octets());
        frame.extend(segment);
        frame
    }

    #[test]
    fn parses_ipv4_segment_without_frame_padding() {
        let mut frame = v4_frame(b"hi");
        frame.extend([0; 4]);
        let segment = TcpSegment::parse(&frame).expect("a segment");
        assert_eq!(segment.source, "10.0.0.1:1000".parse().expect("an address"));
        assert_eq!(segment.destination, "10.0.0.2:2000".parse().expect("an address"));
        assert_eq!(segment.payload, b"hi");
    }

    #[test]
    fn parses_ipv6_segment() {
        let frame = v6_frame(b"hello");
        let segment = TcpSegment::parse(&frame).expect("a segment");
        assert_eq!(segment.source, "[::1]:1000".parse().expect("an address"));
        assert_eq!(segment.destination, "[fd00::2]:2000".parse().expect("an address"));
        assert_eq!(segment.payload, b"hello");
    }

    #[test]
    fn ignores_other_protocols() {
        let mut udp = v4_frame(b"");
        udp[23] = 17;
        assert_eq!(TcpSegment::parse(&udp), None);
        let mut arp = v4_frame(b"");
        arp[13] = 6;
        assert_eq!(TcpSegment::parse(&arp), None);
    }

    #[test]
    fn rejects_frame_truncated_anywhere() {
        for frame in [v4_frame(b"hi"), v6_frame(b"hi")] {
            for len in 0..frame.len() {
                assert_eq!(TcpSegment::parse(&frame[..len]), None, "{len}");
            }
        }
    }
}
