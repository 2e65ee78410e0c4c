//! The parameters of a request: `/path?name=value&…`.

use http::Uri;

use crate::admin::answer::Refusal;

/// The parameters of a request that no code has taken yet.
#[derive(Debug)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    pub(crate) fn of(uri: &Uri) -> Self {
        let pairs = form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes());
        Self(pairs.into_owned().collect())
    }

    /// Takes the value of a parameter.
    ///
    /// # Errors
    ///
    /// The request has it more than once.
    pub(crate) fn take(&mut self, name: &str) -> Result<Option<String>, Refusal> {
        let Some(index) = self.0.iter().position(|(given, _)| given == name) else {
            return Ok(None);
        };
        let (_, value) = self.0.swap_remove(index);
        if self.0.iter().any(|(given, _)| given == name) {
            return Err(Refusal::bad_request(format!("the parameter {name} is given twice")));
        }
        Ok(Some(value))
    }

    /// Refuses the request if it has another parameter than those that were taken, which are the
    /// `known` ones.
    ///
    /// # Errors
    ///
    /// The request has an unknown parameter.
    pub(crate) fn end(self, known: &str) -> Result<(), Refusal> {
        match self.0.first() {
            None => Ok(()),
            Some((name, _)) => Err(Refusal::bad_request(format!(
                "unknown parameter {name:?}: this path has {known}"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(path: &str) -> Query {
        Query::of(&path.parse().unwrap())
    }

    #[test]
    fn parameters_are_decoded_and_taken_once() {
        let mut query = query("/logging?filter=info%2Caccess%3Doff&reset");
        assert_eq!(query.take("filter").unwrap().as_deref(), Some("info,access=off"));
        assert_eq!(query.take("reset").unwrap().as_deref(), Some(""));
        assert_eq!(query.take("filter").unwrap(), None);
        query.end("no parameters").unwrap();
    }

    #[test]
    fn repeated_or_unknown_parameter_is_refused() {
        let refusal = query("/x?a=1&a=2").take("a").unwrap_err();
        assert_eq!(refusal.reason, "the parameter a is given twice");
        let refusal = query("/x?b=1").end("the parameter a").unwrap_err();
        assert_eq!(refusal.reason, "unknown parameter \"b\": this path has the parameter a");
        query("/x").end("no parameters").unwrap();
        query("/x?").end("no parameters").unwrap();
    }
}
