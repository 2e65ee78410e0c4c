//! The protocol of listing and watching one kind of objects, without I/O.
//!
//! ```text
//! list, page by page ─▶ watch from the version of the list ─▶ watch from the last event's version
//!        ▲                             │ 410 Gone: the server has forgotten the version
//!        └─────────────────────────────┘
//! ```

use std::sync::Arc;

use serde_json::Value;
use thiserror::Error;

use super::objects::{ClusterNamespace, ClusterPod, MalformedObject};
use super::view::{Kind, Object};

/// The maximum number of objects in a page.
const PAGE: usize = 500;
/// The maximum duration of a watch in seconds.
pub(super) const WATCH_SECONDS: u64 = 240;

/// The state of the watch of one kind.
#[derive(Debug)]
pub(super) struct Reflector {
    kind: Kind,
    /// Selects the pods of this node.
    node: String,
    position: Position,
}

#[derive(Debug)]
enum Position {
    /// The next request gets a page of the list.
    Listing { gathered: Vec<Object>, token: Option<String> },
    /// The next request watches for later changes.
    Watching { version: String },
}

/// A change of the objects.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// All objects.
    Replace(Vec<Object>),
    Apply(Object),
    Remove(Object),
}

/// The reason why an event or a page cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(super) enum ReflectorError {
    #[error(transparent)]
    Object(#[from] MalformedObject),
    #[error("the API server ended the watch with status {code}: {message}")]
    Status { code: u64, message: String },
}

impl Reflector {
    pub(super) fn new(kind: Kind, node: &str) -> Self {
        Self { kind, node: node.to_owned(), position: listing() }
    }

    /// Whether the next request is a watch, whose body has one event on each line.
    pub(super) fn is_watching(&self) -> bool {
        matches!(self.position, Position::Watching { .. })
    }

    /// The path of the next request.
    pub(super) fn path(&self) -> String {
        let objects = match self.kind {
            Kind::Pods => format!("pods?fieldSelector=spec.nodeName%3D{}&", escaped(&self.node)),
            Kind::Namespaces => "namespaces?".to_owned(),
        };
        let query = match &self.position {
            Position::Listing { token: None, .. } => format!("limit={PAGE}"),
            Position::Listing { token: Some(token), .. } => {
                format!("limit={PAGE}&continue={}", escaped(token))
            }
            Position::Watching { version } => format!(
                "watch=true&allowWatchBookmarks=true&timeoutSeconds={WATCH_SECONDS}&resourceVersion={}",
                escaped(version)
            ),
        };
        format!("/api/v1/{objects}{query}")
    }

    /// Records that the server no longer knows the version or the page. The next request is a new
    /// list.
    pub(super) fn expired(&mut self) {
        self.position = listing();
    }

    /// Applies a page of the list. Returns all objects after the last page.
    pub(super) fn page(&mut self, page: &Value) -> Result<Option<Change>, ReflectorError> {
        let Position::Listing { gathered, token } = &mut self.position else { return Ok(None) };
        let items = page.get("items").and_then(Value::as_array);
        // The items of an empty list may be null.
        let objects = items.into_iter().flatten().map(|item| parse(self.kind, item));
        // Add all objects or none: the page is requested again after an error.
        gathered.extend(objects.collect::<Result<Vec<_>, _>>()?);
        let metadata = |key| page.pointer(key).and_then(Value::as_str);
        let next = metadata("/metadata/continue").filter(|token| !token.is_empty());
        if let Some(next) = next {
            *token = Some(next.to_owned());
            return Ok(None);
        }
        let version = metadata("/metadata/resourceVersion");
        let version = version.ok_or(MalformedObject("metadata.resourceVersion"))?.to_owned();
        let all = std::mem::take(gathered);
        self.position = Position::Watching { version };
        Ok(Some(Change::Replace(all)))
    }

    /// Applies an event of a watch.
    pub(super) fn event(&mut self, event: &Value) -> Result<Option<Change>, ReflectorError> {
        let kind = event.get("type").and_then(Value::as_str).unwrap_or_default();
        let object = event.get("object").ok_or(MalformedObject("object"))?;
        if kind == "ERROR" {
            return self.error(object);
        }
        let version = object.pointer("/metadata/resourceVersion").and_then(Value::as_str);
        let version = version.ok_or(MalformedObject("metadata.resourceVersion"))?.to_owned();
        let change = match kind {
            "ADDED" | "MODIFIED" => Some(Change::Apply(parse(self.kind, object)?)),
            "DELETED" => Some(Change::Remove(parse(self.kind, object)?)),
            "BOOKMARK" => None,
            _ => return Err(MalformedObject("type").into()),
        };
        self.position = Position::Watching { version };
        Ok(change)
    }

    fn error(&mut self, status: &Value) -> Result<Option<Change>, ReflectorError> {
        self.expired();
        let code = status.get("code").and_then(Value::as_u64).unwrap_or_default();
        if code == 410 {
            return Ok(None);
        }
        let message = status.get("message").and_then(Value::as_str).unwrap_or_default().to_owned();
        Err(ReflectorError::Status { code, message })
    }
}

fn listing() -> Position {
    Position::Listing { gathered: Vec::new(), token: None }
}

fn parse(kind: Kind, object: &Value) -> Result<Object, MalformedObject> {
    match kind {
        Kind::Pods => ClusterPod::parse(object).map(Arc::new).map(Object::Pod),
        Kind::Namespaces => ClusterNamespace::parse(object).map(Object::Namespace),
    }
}

/// Escapes the text for a query.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => {
                escaped.push(char::from(byte));
            }
            _ => escaped += &format!("%{byte:02X}"),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::pods::kubernetes::testing::{namespace, pod};

    fn page(items: Vec<Value>, more: &str) -> Value {
        json!({"metadata": {"resourceVersion": "100", "continue": more}, "items": items})
    }

    fn event(kind: &str, object: Value) -> Value {
        json!({"type": kind, "object": object})
    }

    fn name(object: &Object) -> &str {
        match object {
            Object::Pod(pod) => &pod.name,
            Object::Namespace(namespace) => &namespace.name,
        }
    }

    fn names(objects: &[Object]) -> Vec<&str> {
        objects.iter().map(name).collect()
    }

    fn watching() -> Reflector {
        let mut reflector = Reflector::new(Kind::Pods, "node-a");
        reflector.page(&page(vec![], "")).unwrap();
        reflector
    }

    #[test]
    fn pages_are_gathered_until_the_last_one() {
        let mut reflector = Reflector::new(Kind::Pods, "node-a");
        let first = "/api/v1/pods?fieldSelector=spec.nodeName%3Dnode-a&limit=500";
        assert_eq!(reflector.path(), first);
        assert_eq!(reflector.page(&page(vec![pod("web")], "a+/=")), Ok(None));
        assert_eq!(reflector.path(), format!("{first}&continue=a%2B%2F%3D"));
        let Some(Change::Replace(all)) = reflector.page(&page(vec![pod("db")], "")).unwrap() else {
            panic!("the list is complete");
        };
        assert_eq!(names(&all), ["web", "db"]);
        assert!(reflector.path().contains("&watch=true&allowWatchBookmarks=true"));
        assert!(reflector.path().ends_with("&resourceVersion=100"), "{}", reflector.path());
    }

    #[test]
    fn watch_goes_on_from_the_last_event_or_bookmark() {
        let mut reflector = watching();
        for kind in ["ADDED", "MODIFIED"] {
            let change = reflector.event(&event(kind, pod("web"))).unwrap();
            assert!(matches!(change, Some(Change::Apply(Object::Pod(_)))), "{change:?}");
        }
        assert!(reflector.path().ends_with("&resourceVersion=7"));
        let change = reflector.event(&event("DELETED", pod("web"))).unwrap();
        assert!(matches!(change, Some(Change::Remove(Object::Pod(_)))), "{change:?}");
        let bookmark = json!({"metadata": {"resourceVersion": "200"}});
        assert_eq!(reflector.event(&event("BOOKMARK", bookmark)), Ok(None));
        assert!(reflector.path().ends_with("&resourceVersion=200"));
    }

    #[test]
    fn forgotten_version_leads_to_a_new_list() {
        let mut reflector = watching();
        let gone = json!({"code": 410, "message": "too old resource version"});
        assert_eq!(reflector.event(&event("ERROR", gone)), Ok(None));
        assert!(!reflector.is_watching());
        let mut reflector = watching();
        let error = reflector.event(&event("ERROR", json!({"code": 500, "message": "x"})));
        assert_eq!(error, Err(ReflectorError::Status { code: 500, message: "x".to_owned() }));
        assert!(!reflector.is_watching());
        let mut reflector = Reflector::new(Kind::Namespaces, "node-a");
        reflector.page(&page(vec![namespace("shop", "none")], "token")).unwrap();
        reflector.expired();
        let Ok(Some(Change::Replace(all))) = reflector.page(&page(vec![], "")) else {
            panic!("the list is complete");
        };
        assert_eq!(names(&all), [""; 0], "the pages of the old list are dropped");
    }

    #[test]
    fn malformed_events_are_errors() {
        let mut reflector = watching();
        for malformed in [
            json!(7),
            json!({"type": "ADDED"}),
            event("ADDED", json!({"metadata": {"resourceVersion": "8"}})),
            event("SURPRISE", pod("web")),
            event("BOOKMARK", json!({})),
        ] {
            reflector.event(&malformed).unwrap_err();
            assert!(reflector.path().ends_with("=100"), "{malformed} changes nothing");
        }
    }
}
