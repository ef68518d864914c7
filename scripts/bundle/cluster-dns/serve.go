package main

import (
	"strings"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

const (
	upstreamLimit = 3 * time.Second
	// maxAliases is how many aliases are followed, one to the next.
	maxAliases = 8
)

// server answers requests: from the cluster, or from the resolvers upstream.
type server struct {
	cluster  *cluster
	upstream []string
	requests uint64
}

// ServeDNS answers one request.
func (s *server) ServeDNS(w dns.ResponseWriter, request *dns.Msg) {
	atomic.AddUint64(&s.requests, 1)
	network := w.RemoteAddr().Network()
	var reply *dns.Msg
	if len(request.Question) == 1 && request.Opcode == dns.OpcodeQuery {
		reply = s.resolve(request, network, 0)
	} else {
		reply = failure(request, dns.RcodeNotImplemented)
	}
	if network == "udp" {
		fit(reply, request)
	}
	w.WriteMsg(reply) // a client that has gone asks again
}

func (s *server) resolve(request *dns.Msg, network string, aliases int) *dns.Msg {
	question := request.Question[0]
	inZone := dns.IsSubDomain(s.cluster.zone, strings.ToLower(question.Name))
	if inZone && !s.cluster.known() {
		return failure(request, dns.RcodeServerFailure) // not "no such name", which would be believed
	}
	reply := new(dns.Msg).SetReply(request)
	reply.Authoritative, reply.RecursionAvailable = true, true
	if !inZone {
		if question.Qtype == dns.TypePTR {
			if reply.Answer = s.cluster.names(question); len(reply.Answer) > 0 {
				return reply
			}
		}
		return s.forward(request, network)
	}

	var exists bool
	reply.Answer, reply.Extra, exists = s.cluster.answer(question)
	if !exists {
		reply.Rcode = dns.RcodeNameError
	}
	if len(reply.Answer) == 0 {
		reply.Ns = []dns.RR{s.cluster.authority()}
		return reply
	}
	// Clients expect an alias together with what it leads to.
	alias, ok := reply.Answer[0].(*dns.CNAME)
	if ok && question.Qtype != dns.TypeCNAME && aliases < maxAliases {
		next := new(dns.Msg).SetQuestion(alias.Target, question.Qtype)
		reply.Answer = append(reply.Answer, s.resolve(next, network, aliases+1).Answer...)
	}
	return reply
}

// forward asks the resolvers upstream, one after the other.
func (s *server) forward(request *dns.Msg, network string) *dns.Msg {
	client := &dns.Client{Net: network, Timeout: upstreamLimit}
	for _, address := range s.upstream {
		if reply, _, err := client.Exchange(request, address); err == nil {
			return reply
		}
	}
	return failure(request, dns.RcodeServerFailure)
}

func failure(request *dns.Msg, code int) *dns.Msg { return new(dns.Msg).SetRcode(request, code) }

// authority tells for how long "no" may be believed.
func (c *cluster) authority() dns.RR {
	return &dns.SOA{Hdr: dns.RR_Header{Name: c.zone, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: ttl},
		Ns: "ns.dns." + c.zone, Mbox: "hostmaster." + c.zone, Serial: uint32(time.Now().Unix()),
		Refresh: 7200, Retry: 1800, Expire: 86400, Minttl: ttl}
}

// fit makes a reply small enough for the datagram that the client takes; if it lost answers, it says so.
func fit(reply, request *dns.Msg) {
	reply.Compress = true
	limit := dns.MinMsgSize
	if options := request.IsEdns0(); options != nil {
		limit = max(limit, int(options.UDPSize()))
		if reply.IsEdns0() == nil {
			reply.SetEdns0(uint16(limit), false)
		}
	}
	for reply.Len() > limit {
		switch {
		case len(reply.Extra) > 0 && reply.Extra[0].Header().Rrtype != dns.TypeOPT:
			reply.Extra = reply.Extra[1:]
		case len(reply.Answer) > 0:
			reply.Answer = reply.Answer[:len(reply.Answer)-1]
			reply.Truncated = true
		default:
			return
		}
	}
}

func max(a, b int) int {
	if a > b {
		return a
	}
	return b
}
