// Cluster-dns stands in for CoreDNS where that can't be had: it answers for the services and pods of a Kubernetes cluster
// and asks the node's own resolvers for all else. kubeadm's manifest for CoreDNS runs it unchanged: it has the same flag,
// reads the cluster's domain from the same Corefile, and answers the same probes. It knows none of CoreDNS' plugins.
package main

import (
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"sync/atomic"

	"github.com/miekg/dns"
)

const version = "cluster-dns 1: lab's substitute for CoreDNS, not CoreDNS"

// zoneLine is where a Corefile says what the cluster's domain is.
var zoneLine = regexp.MustCompile(`(?m)^\s*kubernetes\s+([a-zA-Z0-9.-]+)`)

func main() {
	log.SetFlags(0) // the container runtime adds the time
	corefile := flag.String("conf", "", "the Corefile to read the cluster's domain from; cluster.local without one")
	show := flag.Bool("version", false, "say what this is")
	flag.Parse()
	if *show {
		fmt.Println(version)
		return
	}

	zone, err := readZone(*corefile)
	if err != nil {
		log.Fatal(err)
	}
	upstream, err := readResolvers("/etc/resolv.conf")
	if err != nil {
		log.Fatal(err)
	}
	api, err := inClusterAPI()
	if err != nil {
		log.Fatal(err)
	}
	server := &server{
		cluster: &cluster{
			zone:      zone,
			services:  follow[service](api, "/api/v1/services"),
			endpoints: follow[endpoints](api, "/api/v1/endpoints"),
		},
		upstream: upstream,
	}
	log.Printf("%s; serves %s, asks %v for the rest", version, zone, upstream)

	http.HandleFunc("/health", server.health)
	http.HandleFunc("/ready", server.ready)
	http.HandleFunc("/metrics", server.metrics)
	for _, address := range []string{":8080", ":8181", ":9153"} {
		go func(address string) { log.Fatal(http.ListenAndServe(address, nil)) }(address)
	}
	go func() { log.Fatal(dns.ListenAndServe(":53", "tcp", server)) }()
	log.Fatal(dns.ListenAndServe(":53", "udp", server))
}

func readZone(corefile string) (string, error) {
	if corefile == "" {
		return "cluster.local.", nil
	}
	text, err := os.ReadFile(corefile)
	if err != nil {
		return "", err
	}
	found := zoneLine.FindSubmatch(text)
	if found == nil {
		return "", fmt.Errorf("%s has no line `kubernetes DOMAIN`", corefile)
	}
	return strings.ToLower(dns.Fqdn(string(found[1]))), nil
}

func readResolvers(file string) ([]string, error) {
	config, err := dns.ClientConfigFromFile(file)
	if err != nil {
		return nil, err
	}
	var upstream []string
	for _, address := range config.Servers {
		// The node's own loopback can't be reached from a pod: there it would be this very server.
		if ip := net.ParseIP(address); ip != nil && !ip.IsLoopback() {
			upstream = append(upstream, net.JoinHostPort(address, config.Port))
		}
	}
	return upstream, nil
}

func (s *server) health(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "OK") }

func (s *server) ready(w http.ResponseWriter, _ *http.Request) {
	if !s.cluster.known() {
		http.Error(w, "the cluster's services are not known yet", http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "OK")
}

func (s *server) metrics(w http.ResponseWriter, _ *http.Request) {
	const name = "cluster_dns_requests_total"
	fmt.Fprintf(w, "# TYPE %s counter\n%s %d\n", name, name, atomic.LoadUint64(&s.requests))
}
