package main

import (
	"math/rand"
	"net"
	"strings"

	"github.com/miekg/dns"
)

// ttl of all records, in seconds: what kubeadm's Corefile says.
const ttl = 30

// cluster answers for the names of a cluster, after the specification for DNS in Kubernetes, version 1.1.0, IPv4 only:
// https://github.com/kubernetes/dns/blob/master/docs/specification.md
type cluster struct {
	zone      string // with the dot at its end, in lower case
	services  *mirror[service]
	endpoints *mirror[endpoints]
}

// host is where a name of a service leads to.
type host struct {
	name, ip string
	ports    []servicePort
}

func (c *cluster) known() bool { return c.services.known() && c.endpoints.known() }

// hosts are the addresses behind a service: its own, or without one that of each of its pods.
func (c *cluster) hosts(s service) []host {
	name := s.Metadata.Name + "." + s.Metadata.Namespace + ".svc." + c.zone
	if s.Spec.ClusterIP != "None" {
		if s.Spec.ClusterIP == "" {
			return nil
		}
		return []host{{name, s.Spec.ClusterIP, s.Spec.Ports}}
	}
	found, _ := c.endpoints.get(s.key())
	var hosts []host
	for _, subset := range found.Subsets {
		addresses := subset.Addresses
		if s.Spec.PublishNotReadyAddresses {
			addresses = append(append([]endpointAddress{}, addresses...), subset.NotReadyAddresses...)
		}
		for _, address := range addresses {
			label := address.Hostname
			if label == "" {
				label = strings.NewReplacer(".", "-", ":", "-").Replace(address.IP)
			}
			hosts = append(hosts, host{label + "." + name, address.IP, subset.Ports})
		}
	}
	rand.Shuffle(len(hosts), func(a, b int) { hosts[a], hosts[b] = hosts[b], hosts[a] }) // so that load is spread
	return hosts
}

// answer looks up a name in the zone, and says whether there is such a name at all.
func (c *cluster) answer(question dns.Question) (records, extra []dns.RR, exists bool) {
	header := func(kind uint16) dns.RR_Header {
		return dns.RR_Header{Name: question.Name, Rrtype: kind, Class: dns.ClassINET, Ttl: ttl}
	}
	addAddress := func(ip string) {
		if address := net.ParseIP(ip).To4(); address != nil && question.Qtype == dns.TypeA {
			records = append(records, &dns.A{Hdr: header(dns.TypeA), A: address})
		}
	}
	addPort := func(h host, port servicePort) {
		if question.Qtype != dns.TypeSRV {
			return
		}
		records = append(records, &dns.SRV{Hdr: header(dns.TypeSRV), Weight: 100, Port: port.Port, Target: h.name})
		if address := net.ParseIP(h.ip).To4(); address != nil {
			extra = append(extra, &dns.A{Hdr: dns.RR_Header{Name: h.name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: ttl},
				A: address})
		}
	}

	labels := dns.SplitDomainName(strings.TrimSuffix(strings.ToLower(question.Name), c.zone))
	last := len(labels) - 1
	switch {
	case last == -1:
		return nil, nil, true
	case labels[last] == "dns-version" && last == 0:
		if question.Qtype == dns.TypeTXT {
			records = append(records, &dns.TXT{Hdr: header(dns.TypeTXT), Txt: []string{"1.1.0"}})
		}
		return records, nil, true
	case labels[last] == "pod" && last <= 2:
		// a-b-c-d.NAMESPACE.pod: whether there is such a pod is not looked up; nor does CoreDNS, as kubeadm sets it up.
		if last < 2 {
			return nil, nil, true
		}
		ip := strings.ReplaceAll(labels[0], "-", ".")
		addAddress(ip)
		return records, nil, net.ParseIP(ip) != nil
	case labels[last] != "svc":
		return nil, nil, false
	case last < 2:
		return nil, nil, true
	}

	found, ok := c.services.get(labels[last-1] + "/" + labels[last-2])
	rest := labels[:last-2]
	switch {
	case !ok:
	case found.Spec.Type == "ExternalName":
		if len(rest) == 0 {
			target := dns.Fqdn(found.Spec.ExternalName)
			return []dns.RR{&dns.CNAME{Hdr: header(dns.TypeCNAME), Target: target}}, nil, true
		}
	case len(rest) == 0:
		exists = true
		for _, h := range c.hosts(found) {
			addAddress(h.ip)
			for _, port := range h.ports {
				addPort(h, port)
			}
		}
	case len(rest) == 1: // one pod of a service without an address
		for _, h := range c.hosts(found) {
			if label, _, _ := strings.Cut(h.name, "."); label == rest[0] && found.Spec.ClusterIP == "None" {
				exists = true
				addAddress(h.ip)
			}
		}
	case len(rest) == 2: // _port._protocol
		for _, h := range c.hosts(found) {
			for _, port := range h.ports {
				if "_"+port.Name == rest[0] && "_"+strings.ToLower(port.Protocol) == rest[1] {
					exists = true
					addPort(h, port)
				}
			}
		}
	}
	// A pod may be listed once for each of its ports.
	return dns.Dedup(records, nil), dns.Dedup(extra, nil), exists
}

// names are what an address is called in the cluster.
func (c *cluster) names(question dns.Question) (records []dns.RR) {
	for _, s := range c.services.all() {
		for _, h := range c.hosts(s) {
			if reversed, err := dns.ReverseAddr(h.ip); err == nil && strings.EqualFold(reversed, question.Name) {
				records = append(records, &dns.PTR{Hdr: dns.RR_Header{Name: question.Name, Rrtype: dns.TypePTR,
					Class: dns.ClassINET, Ttl: ttl}, Ptr: h.name})
			}
		}
	}
	return records
}
