//! labfiles/msa: a shop as microservices and in one piece, on a cluster of a master and a worker.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr, missing_docs)]

use lab_tests::{
    TestLab,
    cluster::{self, Cluster},
    free_port, http_get, long,
};
use serde_json::Value;

/// The cluster with the shop.
struct Shop(Cluster);

impl std::ops::Deref for Shop {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        &self.0
    }
}

impl Shop {
    /// Scales a service, and waits until that is done.
    fn scale(&self, service: &str, replicas: usize) {
        self.kubectl(&format!("scale deployment/{service} --replicas={replicas}"));
        self.kubectl(&format!("rollout status deployment/{service} --timeout=900s"));
    }

    /// What the shop answers. One that can't answer now is asked again: its pods come and go in these tests.
    fn ask(&self, question: &str) -> Value {
        let mut answer = Value::Null;
        self.until(question, || {
            let (status, said) = self.lab.shell("master", &format!("shop ask {question}"), b"");
            answer = serde_json::from_str(&said).unwrap_or_default();
            (status == Some(0) && !answer.is_null() && answer.get("error").is_none())
                .then_some(())
                .ok_or(said)
        });
        answer
    }

    fn stock(&self, product: u32) -> i64 {
        self.ask(&format!("GET /api/products/{product}"))["stock"].as_i64().unwrap()
    }

    /// Who serves the products: `catalog/1 POD`.
    fn catalog(&self) -> String {
        let script = "curl -si --max-time 60 http://master:30080/api/products | sed -n 's/^X-Served-By: //p'";
        self.lab.shell("master", script, b"").1.trim().into()
    }

    fn until_stock(&self, product: u32, wanted: i64) {
        self.until("the event lowers the stock", || match self.stock(product) {
            stock if stock == wanted => Ok(()),
            stock => Err(format!("it is {stock}, not {wanted}")),
        });
    }
}

#[test]
fn a_shop_of_microservices() {
    if !long("the shop of microservices") || !cluster::can_be_had("the shop of microservices") {
        return;
    }
    let (port, whole, api) = (free_port(), free_port(), free_port());
    let lab = TestLab::example_folder("msa", |text| {
        let text = text.replacen("name = \"msa\"", "name = \"msa-test\"", 1);
        assert!(["\"8080:", "\"8081:", "\"6443:"].iter().all(|forward| text.contains(forward)));
        text.replace("\"8080:", &format!("\"{port}:"))
            .replace("\"8081:", &format!("\"{whole}:"))
            .replace("\"6443:", &format!("\"{api}:"))
    });
    let shop = Shop(Cluster { lab });
    shop.lab.run(&["up"]);
    shop.lab.run(&["check"]);

    // From this machine: the page of both, and what the gateway passes on.
    for port in [port, whole] {
        assert!(http_get(port, "/").contains("A small shop"));
        assert!(http_get(port, "/api/products").contains("teapot"));
    }

    an_event_reaches_its_subscribers(&shop);
    a_subscriber_that_is_away(&shop);
    one_service_is_scaled(&shop);
    an_update_and_back(&shop);
    pods_die(&shop);

    // It is the same application as the monolith, whatever it has been through.
    assert!(shop.master("shop compare").contains("all the same"));
    shop.lab.run(&["check"]);
}

fn an_event_reaches_its_subscribers(shop: &Shop) {
    let before = shop.stock(1);
    let said = shop.master("shop order reader 1 2");
    let order: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    assert_eq!(order["total"], 4800, "{said}");
    shop.until_stock(1, before - 2);
    // The other subscriber has seen the same.
    assert!(shop.ask("GET /api/events").as_array().unwrap().contains(&order));
    assert_eq!(shop.ask("GET /api/orders")[0], order);
    assert_eq!(shop.ask("GET /api/carts/reader")["total"], 0);
}

/// An order does not wait for the catalog, and the catalog learns of it when it is back.
fn a_subscriber_that_is_away(shop: &Shop) {
    let before = shop.stock(2);
    shop.ask("PUT /api/carts/away/2 '{\"count\": 5}'");
    shop.scale("catalog", 0);
    shop.until("nobody serves the products", || match shop.catalog() {
        who if who.starts_with("catalog/") => Err(who),
        _ => Ok(()),
    });
    let order = shop.ask("POST /api/orders '{\"customer\": \"away\"}'");
    assert_eq!(order["total"], 3250);
    shop.scale("catalog", 1);
    shop.until_stock(2, before - 5);
}

fn one_service_is_scaled(shop: &Shop) {
    shop.scale("catalog", 2);
    let mut seen = std::collections::BTreeSet::new();
    shop.until("both copies serve", || {
        seen.insert(shop.catalog());
        let both = seen.iter().filter(|who| who.starts_with("catalog/1 catalog-")).count() == 2;
        both.then_some(()).ok_or_else(|| format!("{seen:?}"))
    });
    assert_eq!(shop.kubectl("get deployment orders -o 'jsonpath={.status.readyReplicas}'"), "1");
    // They are one subscriber: each order lowers the stock once.
    let before = shop.stock(3);
    for _ in 0..3 {
        shop.master("shop order both 3 1");
    }
    shop.until_stock(3, before - 3);
    shop.scale("catalog", 1);
}

fn an_update_and_back(shop: &Shop) {
    shop.master("shop build catalog 2");
    let status = "rollout status deployment/catalog --timeout=900s";
    let served_by = |version: &str| {
        shop.until(&format!("version {version} serves"), || match shop.catalog() {
            who if who.starts_with(&format!("catalog/{version} ")) => Ok(()),
            who => Err(who),
        });
    };
    shop.kubectl("set image deployment/catalog catalog=master:5000/shop/catalog:2");
    shop.kubectl(status);
    served_by("2");
    shop.kubectl("rollout undo deployment/catalog");
    shop.kubectl(status);
    served_by("1");
}

/// A process that ends is started again, a pod that is removed is replaced; what is on a volume is still there.
fn pods_die(shop: &Shop) {
    let (orders, products) = (shop.ask("GET /api/orders"), shop.ask("GET /api/products"));
    let restarts =
        "get pods -l app=orders -o 'jsonpath={.items[0].status.containerStatuses[0].restartCount}'";
    let before = shop.kubectl(restarts);
    shop.master("kubectl exec deployment/orders -- kill 1");
    shop.until("its process is started again", || match shop.kubectl(restarts) {
        restarts if restarts == before => Err(restarts),
        _ => Ok(()),
    });
    let pod = "get pods -l app=catalog-db -o 'jsonpath={.items[*].metadata.name}'";
    let old = shop.kubectl(pod);
    shop.kubectl(&format!("delete pod {old} --ignore-not-found"));
    shop.until("another pod is there", || match shop.kubectl(pod) {
        pods if pods.is_empty() || pods.contains(&old) => Err(pods),
        _ => Ok(()),
    });
    assert_eq!(shop.ask("GET /api/orders"), orders);
    assert_eq!(shop.ask("GET /api/products"), products);
    shop.kubectl("wait --for=condition=Available deployment --all --timeout=900s");
}
