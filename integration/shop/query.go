// SPDX-License-Identifier: Apache-2.0

package shop

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// Query asks a running shop for the truth. It may be used concurrently.
type Query struct {
	base   string
	client *http.Client
}

// NewQuery returns a Query for the shop at addr, a host and port. dial reaches
// into the shop's network namespace; nil dials from the caller's own. A new
// connection is made for each question, so that a connection from before a
// restore is never mistaken for the restored shop.
func NewQuery(addr string, dial func(ctx context.Context, network, addr string) (net.Conn, error)) *Query {
	t := &http.Transport{DisableKeepAlives: true, DialContext: dial}
	return &Query{base: "http://" + addr, client: &http.Client{Transport: t}}
}

// State returns the shop's counts and connections at one instant, with no
// order in flight. It fails when running orders do not end before ctx does,
// which is what a connection that did not survive looks like.
func (q *Query) State(ctx context.Context) (State, error) {
	var s State
	return s, q.getJSON(ctx, "/state?quiesce=1", &s)
}

// LiveState is State without holding orders back: InFlight bounds how far the
// counts may be apart.
func (q *Query) LiveState(ctx context.Context) (State, error) {
	var s State
	return s, q.getJSON(ctx, "/state", &s)
}

// Counter returns Redis's counter.
func (q *Query) Counter(ctx context.Context) (int64, error) {
	var c struct {
		Count int64 `json:"count"`
	}
	return c.Count, q.getJSON(ctx, "/counter", &c)
}

// Orders returns PostgreSQL's table in the order of its sequence.
func (q *Query) Orders(ctx context.Context) ([]Order, error) {
	body, err := q.get(ctx, http.MethodGet, "/tokens", nil)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	var orders []Order
	lines := bufio.NewScanner(body)
	for lines.Scan() {
		var o Order
		if err := json.Unmarshal(lines.Bytes(), &o); err != nil {
			return nil, fmt.Errorf("asking the shop for its orders: %w", err)
		}
		orders = append(orders, o)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("asking the shop for its orders: %w", err)
	}
	return orders, nil
}

// Place places one order.
func (q *Query) Place(ctx context.Context, token string) (OrderAnswer, error) {
	var a OrderAnswer
	in, err := json.Marshal(OrderRequest{Token: token})
	if err != nil {
		return a, err
	}
	body, err := q.get(ctx, http.MethodPost, "/order", in)
	if err != nil {
		return a, err
	}
	defer body.Close()
	if err := json.NewDecoder(body).Decode(&a); err != nil {
		return a, fmt.Errorf("placing an order: %w", err)
	}
	return a, nil
}

// WaitHealthy returns when the shop has filled its pools and answers, or with
// the last reason why not when ctx ends.
func (q *Query) WaitHealthy(ctx context.Context) error {
	// The shop has no way to tell a stranger that it is up, so this polls.
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		one, cancel := context.WithTimeout(ctx, 2*time.Second)
		body, err := q.get(one, http.MethodGet, "/healthz", nil)
		cancel()
		if err == nil {
			return body.Close()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for the shop to be healthy: %w; last try: %w", ctx.Err(), err)
		case <-tick.C:
		}
	}
}

func (q *Query) getJSON(ctx context.Context, path string, into any) error {
	body, err := q.get(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer body.Close()
	if err := json.NewDecoder(body).Decode(into); err != nil {
		return fmt.Errorf("asking the shop for %s: %w", path, err)
	}
	return nil
}

func (q *Query) get(ctx context.Context, method, path string, in []byte) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, method, q.base+path, bytes.NewReader(in))
	if err != nil {
		return nil, err
	}
	resp, err := q.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("asking the shop for %s: %w", path, err)
	}
	if resp.StatusCode != http.StatusOK {
		why, _ := io.ReadAll(io.LimitReader(resp.Body, 512))
		resp.Body.Close()
		return nil, fmt.Errorf("asking the shop for %s: %s: %s", path, resp.Status, bytes.TrimSpace(why))
	}
	return resp.Body, nil
}
