//! The web page at `/` of the admin listeners. Its files are part of the binary.
//!
//! The page reads the other paths of the listener, and nothing else: its content security policy
//! allows no inline code, no other origin, and no frame around it.

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderValue, header};

use crate::admin::answer::{Answer, of_type};

const HTML: HeaderValue = HeaderValue::from_static("text/html; charset=utf-8");
const CSS: HeaderValue = HeaderValue::from_static("text/css; charset=utf-8");
const JAVASCRIPT: HeaderValue = HeaderValue::from_static("text/javascript; charset=utf-8");
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);

/// A file of the page.
#[derive(Debug)]
struct File {
    path: &'static str,
    content_type: HeaderValue,
    content: &'static str,
}

const FILES: [File; 7] = [
    file("/", HTML, include_str!("page/index.html")),
    file("/page.css", CSS, include_str!("page/page.css")),
    file("/page.js", JAVASCRIPT, include_str!("page/page.js")),
    file("/dom.js", JAVASCRIPT, include_str!("page/dom.js")),
    file("/graph.js", JAVASCRIPT, include_str!("page/graph.js")),
    file("/rules.js", JAVASCRIPT, include_str!("page/rules.js")),
    file("/sections.js", JAVASCRIPT, include_str!("page/sections.js")),
];

const fn file(path: &'static str, content_type: HeaderValue, content: &'static str) -> File {
    File { path, content_type, content }
}

/// The file of the page that a GET request asks for. `/` is the page only for a browser: other
/// clients get the list of paths.
pub(super) fn answer(request: &Parts) -> Option<Answer> {
    let path = request.uri.path();
    if path == "/" && !accepts_html(request) {
        return None;
    }
    let File { content_type, content, .. } = FILES.into_iter().find(|file| file.path == path)?;
    let mut answer = of_type(content_type, Bytes::from_static(content.as_bytes()));
    answer.headers_mut().insert(header::CONTENT_SECURITY_POLICY, POLICY);
    Some(answer)
}

fn accepts_html(request: &Parts) -> bool {
    let accepted = request.headers.get_all(header::ACCEPT).iter();
    accepted.filter_map(|value| value.to_str().ok()).any(|value| value.contains("text/html"))
}

#[cfg(test)]
mod tests {
    use http::Request;
    use http_body_util::BodyExt as _;

    use super::*;

    fn request(path: &str, accept: &str) -> Parts {
        let request = Request::get(path).header(header::ACCEPT, accept).body(());
        request.unwrap().into_parts().0
    }

    #[tokio::test]
    async fn browser_gets_the_page_and_every_file_it_names() {
        let page = answer(&request("/", "text/html,application/xhtml+xml")).unwrap();
        assert_eq!(page.headers()[header::CONTENT_SECURITY_POLICY], POLICY);
        let mut texts = vec![page.into_body().collect().await.unwrap().to_bytes()];
        let mut served = 1;
        while let Some(text) = texts.pop() {
            let text = String::from_utf8(text.to_vec()).unwrap();
            let names = text.split(['"', '\'']).map(|name| name.trim_start_matches("./"));
            for name in names.filter(|name| name.ends_with(".js") || name.ends_with(".css")) {
                let file = answer(&request(&format!("/{name}"), "*/*"));
                let file = file.unwrap_or_else(|| panic!("{name} is not served"));
                served += 1;
                if served < 20 {
                    texts.push(file.into_body().collect().await.unwrap().to_bytes());
                }
            }
        }
        assert!(served >= FILES.len(), "{served} files");
    }

    #[test]
    fn other_clients_get_no_page() {
        for accept in ["*/*", "application/json"] {
            assert!(answer(&request("/", accept)).is_none(), "{accept}");
        }
        assert!(answer(&request("/status", "text/html")).is_none());
    }

    /// Text of the proxy, such as names of peers, must not become markup.
    #[test]
    fn page_makes_no_markup_from_text() {
        for File { path, content, .. } in FILES {
            for wrong in
                ["insertAdjacentHTML", "document.write", "outerHTML", "eval(", ".innerHTML = "]
            {
                assert!(!content.contains(wrong), "{path} uses {wrong}");
            }
            assert!(!content.contains("//cdn") && !content.contains("https://"), "{path}");
        }
    }
}
