//! A token bucket: allows a burst of events, then a rate.
//!
//! The caller counts the events, and acts when the bucket is empty.

/// Tokens for a peer's requests. Times are milliseconds since the connection opened.
#[derive(Debug)]
pub(crate) struct TokenBucket {
    size: u64,
    per_second: u64,
    left: u64,
    /// The time of the last refill, and the tokens that the peer had earned until then.
    refilled: u64,
    earned: u64,
}

impl TokenBucket {
    /// Creates a full bucket of `size` tokens.
    pub(crate) fn new(size: u64, per_second: u64) -> Self {
        Self { size, per_second, left: size, refilled: 0, earned: 0 }
    }

    /// Takes `count` tokens. Returns `false` if there are too few. `earned` is the total of tokens
    /// that the peer has earned, for example by sending data. The bucket is refilled only when it
    /// is empty, which is rare.
    pub(crate) fn take(&mut self, count: u64, now: u64, earned: u64) -> bool {
        if self.left < count {
            let with_time =
                now.saturating_sub(self.refilled).saturating_mul(self.per_second) / 1000;
            let refill = with_time.saturating_add(earned.saturating_sub(self.earned));
            self.left = self.left.saturating_add(refill).min(self.size);
            (self.refilled, self.earned) = (now, earned);
        }
        match self.left.checked_sub(count) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bucket_allows_burst_then_only_its_rate() {
        let mut bucket = TokenBucket::new(100, 10);
        assert!((0..100).all(|_| bucket.take(1, 0, 0)));
        assert!(!bucket.take(1, 99, 0), "a tenth of a second has not passed");
        assert!((1..=50).all(|tenth| bucket.take(1, 99 + tenth * 100, 0)));
        assert!(!bucket.take(1, 99 + 5_000, 0));
    }

    #[test]
    fn bucket_refills_with_earned_tokens_up_to_its_size() {
        let mut bucket = TokenBucket::new(10, 1);
        assert!(bucket.take(10, 0, 0));
        assert!(bucket.take(4, 0, 4) && !bucket.take(1, 0, 4), "what was earned counts once");
        assert!(bucket.take(10, 0, 1000) && !bucket.take(1, 0, 1000));
        assert!(!bucket.take(11, u64::MAX, u64::MAX));
    }
}
