//! The cryptographic algorithms of TLS, for handshakes and for certificates.

use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use underpass_config::Cipher;

/// Cryptography for TLS: AES-GCM, and a key exchange that also resists quantum computers.
///
/// The order of `ciphers` is the server's preference. AES-128 comes first by default: it needs a
/// quarter less CPU than AES-256, and a search of 2^128 keys is infeasible (NIST, Post-Quantum
/// Cryptography FAQ).
pub(crate) fn provider(ciphers: &[Cipher]) -> Arc<CryptoProvider> {
    let suite = |cipher: &Cipher| match cipher {
        Cipher::Aes128Gcm => cipher_suite::TLS13_AES_128_GCM_SHA256,
        Cipher::Aes256Gcm => cipher_suite::TLS13_AES_256_GCM_SHA384,
    };
    Arc::new(CryptoProvider {
        cipher_suites: ciphers.iter().map(suite).collect(),
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1],
        ..aws_lc_rs::default_provider()
    })
}
