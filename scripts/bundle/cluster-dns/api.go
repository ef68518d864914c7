package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"sync"
	"time"
)

const (
	credentials = "/var/run/secrets/kubernetes.io/serviceaccount/"
	// watchFor is after how long the API server ends a watch.
	watchFor = 5 * time.Minute
	// requestLimit is longer: a busy API server takes its time.
	requestLimit = watchFor + time.Minute
	retryAfter   = 2 * time.Second
)

// Of the API's objects, what names are made of. Names of fields in JSON are the same but for case.
type (
	meta struct{ Namespace, Name, ResourceVersion string }

	servicePort struct {
		Name, Protocol string
		Port           uint16
	}

	service struct {
		Metadata meta
		Spec     struct {
			Type, ClusterIP, ExternalName string
			Ports                         []servicePort
			PublishNotReadyAddresses      bool
		}
	}

	endpointAddress struct{ IP, Hostname string }

	endpoints struct {
		Metadata meta
		Subsets  []struct {
			Addresses, NotReadyAddresses []endpointAddress
			Ports                        []servicePort
		}
	}
)

type object interface{ key() string }

func (m meta) key() string      { return m.Namespace + "/" + m.Name }
func (s service) key() string   { return s.Metadata.key() }
func (e endpoints) key() string { return e.Metadata.key() }

// apiServer is asked as the pod's service account.
type apiServer struct {
	url    string
	client *http.Client
}

func inClusterAPI() (*apiServer, error) {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("this is to be run in a pod: KUBERNETES_SERVICE_HOST and _PORT name no API server")
	}
	authority, err := os.ReadFile(credentials + "ca.crt")
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(authority) {
		return nil, fmt.Errorf("%sca.crt has no certificate", credentials)
	}
	return &apiServer{
		url: "https://" + net.JoinHostPort(host, port),
		client: &http.Client{
			Timeout:   requestLimit,
			Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}},
		},
	}, nil
}

func (a *apiServer) get(path string) (io.ReadCloser, error) {
	token, err := os.ReadFile(credentials + "token") // it may have been renewed
	if err != nil {
		return nil, err
	}
	request, err := http.NewRequest(http.MethodGet, a.url+path, nil)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Authorization", "Bearer "+string(token))
	response, err := a.client.Do(request)
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		response.Body.Close()
		return nil, fmt.Errorf("%s: %s", path, response.Status)
	}
	return response.Body, nil
}

// mirror holds all objects of one kind as the API server last told.
type mirror[T object] struct {
	mutex   sync.RWMutex
	objects map[string]T // nil until they are known
}

// follow keeps a mirror of what is at a path, from now on.
func follow[T object](api *apiServer, path string) *mirror[T] {
	m := &mirror[T]{}
	go func() {
		for {
			// What was known stays in use until the next list: a DNS server outlives its API server.
			if err := m.listAndWatch(api, path); err != nil {
				log.Printf("the API server is asked again: %v", err)
				time.Sleep(retryAfter)
			}
		}
	}()
	return m
}

func (m *mirror[T]) listAndWatch(api *apiServer, path string) error {
	body, err := api.get(path)
	if err != nil {
		return err
	}
	defer body.Close()
	var list struct {
		Metadata meta
		Items    []T
	}
	if err := json.NewDecoder(body).Decode(&list); err != nil {
		return err
	}
	objects := make(map[string]T, len(list.Items))
	for _, item := range list.Items {
		objects[item.key()] = item
	}
	m.mutex.Lock()
	m.objects = objects
	m.mutex.Unlock()

	changes, err := api.get(fmt.Sprintf("%s?watch=true&timeoutSeconds=%d&resourceVersion=%s", path,
		int(watchFor.Seconds()), list.Metadata.ResourceVersion))
	if err != nil {
		return err
	}
	defer changes.Close()
	for decoder := json.NewDecoder(changes); ; {
		var change struct {
			Type   string
			Object T
		}
		if err := decoder.Decode(&change); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		m.mutex.Lock()
		switch change.Type {
		case "ADDED", "MODIFIED":
			m.objects[change.Object.key()] = change.Object
		case "DELETED":
			delete(m.objects, change.Object.key())
		}
		m.mutex.Unlock()
		if change.Type == "ERROR" {
			return fmt.Errorf("%s: it ended the watch", path)
		}
	}
}

func (m *mirror[T]) known() bool {
	m.mutex.RLock()
	defer m.mutex.RUnlock()
	return m.objects != nil
}

func (m *mirror[T]) get(key string) (T, bool) {
	m.mutex.RLock()
	defer m.mutex.RUnlock()
	found, ok := m.objects[key]
	return found, ok
}

func (m *mirror[T]) all() []T {
	m.mutex.RLock()
	defer m.mutex.RUnlock()
	all := make([]T, 0, len(m.objects))
	for _, object := range m.objects {
		all = append(all, object)
	}
	return all
}
