//! The answers of the HTTP endpoints: text, JSON, and streams.

use std::convert::Infallible;

use bytes::Bytes;
use futures_util::stream::{Stream, StreamExt as _};
use http::{HeaderValue, Method, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Frame;
use serde::Serialize;

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
pub(crate) const JSON: HeaderValue = HeaderValue::from_static("application/json");

pub(crate) type Body = UnsyncBoxBody<Bytes, Infallible>;
pub(crate) type Answer = Response<Body>;

/// An answer with an error status, for a request that is not performed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    /// The reason, and what would be right.
    pub(crate) reason: String,
    /// The methods of the path, if the request has another one.
    allow: Option<HeaderValue>,
}

impl Refusal {
    pub(crate) fn new(status: StatusCode, reason: impl Into<String>) -> Self {
        Self { status, reason: reason.into(), allow: None }
    }

    /// A request with another method than these.
    pub(crate) fn method(methods: &[Method], reason: impl Into<String>) -> Self {
        let names: Vec<_> = methods.iter().map(Method::as_str).collect();
        let allow = HeaderValue::from_str(&names.join(", ")).ok();
        Self { allow, ..Self::new(StatusCode::METHOD_NOT_ALLOWED, reason) }
    }

    /// A request with a wrong parameter.
    pub(crate) fn bad_request(reason: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, reason)
    }
}

impl From<Refusal> for Answer {
    fn from(Refusal { status, reason, allow }: Refusal) -> Self {
        let mut answer = text(status, format!("{reason}\n"));
        if let Some(methods) = allow {
            answer.headers_mut().insert(header::ALLOW, methods);
        }
        answer
    }
}

/// A text, which ends with a line break.
pub(crate) fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    let mut answer = of_type(TEXT, body);
    *answer.status_mut() = status;
    answer
}

/// A whole body of this content type.
pub(crate) fn of_type(content_type: HeaderValue, body: impl Into<Bytes>) -> Answer {
    with_type(content_type, Full::new(body.into()).boxed_unsync())
}

/// A small value as JSON on one line.
pub(crate) fn json(value: &impl Serialize) -> Answer {
    match serde_json::to_vec(value) {
        Ok(mut body) => {
            body.push(b'\n');
            of_type(JSON, body)
        }
        Err(error) => {
            let reason = format!("internal error: the answer is no JSON: {error}");
            Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, reason).into()
        }
    }
}

/// A long body, whose chunks are made one at a time when the client has read the ones before.
/// Other tasks of the thread run between two chunks.
pub(crate) fn stream(
    content_type: HeaderValue,
    chunks: impl Stream<Item = Bytes> + Send + 'static,
) -> Answer {
    let frames = chunks.then(|chunk| async {
        tokio::task::yield_now().await;
        Ok(Frame::data(chunk))
    });
    with_type(content_type, StreamBody::new(frames).boxed_unsync())
}

fn with_type(content_type: HeaderValue, body: Body) -> Answer {
    let mut answer = Response::new(body);
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, content_type);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer
}
