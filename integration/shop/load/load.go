// SPDX-License-Identifier: Apache-2.0

// Package load places orders in a shop from outside the group and writes down
// what it was promised.
//
// A worker has one connection and one order under way. When the connection
// breaks, which is what a restore does to a client outside the group, it
// records the order as unanswered and dials again; a token is never sent
// twice.
package load

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/cohort-project/cohort/integration/shop"
)

// Options say how to load a shop.
type Options struct {
	// Addr is the shop's host and port.
	Addr string
	// Workers is how many orders may be under way, at least 1.
	Workers int
	// Rate bounds the orders a second of all workers together; 0 is no bound.
	Rate float64
	// Timeout bounds one order, dialing included.
	Timeout time.Duration
	// Grace is how long orders under way may take to end after the load is
	// told to stop.
	Grace time.Duration
	// Dial reaches the shop; nil dials from the caller's network namespace.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// Log is where answers go.
	Log *shop.LogWriter
}

// Summary is what a load client has seen. Durations are in milliseconds.
type Summary struct {
	Acked int64 `json:"acked"`
	// Unanswered orders: ConnErrors by the connection, Timeouts by time,
	// Refused by a status other than 200.
	ConnErrors int64  `json:"conn_errors"`
	Timeouts   int64  `json:"timeouts"`
	Refused    int64  `json:"refused"`
	LastError  string `json:"last_error,omitempty"`
	// Dials is the number of connections made, one per worker if none broke.
	Dials int64 `json:"dials"`

	DurationMS float64 `json:"duration_ms"`
	Rate       float64 `json:"rate"`
	MaxSeq     int64   `json:"max_seq"`
	// MaxGapMS is the longest time without an answer to any worker, and MaxGapAt
	// when it began: the stop as clients feel it.
	MaxGapMS     float64   `json:"max_gap_ms"`
	MaxGapAt     time.Time `json:"max_gap_at"`
	LatencyAvgMS float64   `json:"latency_avg_ms"`
	LatencyMaxMS float64   `json:"latency_max_ms"`
}

// Run loads the shop until ctx ends, then lets orders under way finish, writes
// the log's last line and returns the summary. The error is about the log;
// errors of orders are counted, not returned.
func Run(ctx context.Context, o Options) (Summary, error) {
	g := &gen{Options: o, began: time.Now()}
	g.lastAck = g.began
	hard, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var workers sync.WaitGroup
	for n := range o.Workers {
		workers.Go(func() { g.work(ctx, hard, n) })
	}
	done := make(chan struct{})
	go func() { workers.Wait(); close(done) }()
	<-ctx.Done()
	select {
	case <-done:
	case <-time.After(o.Grace):
		cancel()
		<-done
	}
	return g.summary(), o.Log.End()
}

type gen struct {
	Options
	began time.Time

	mu      sync.Mutex
	s       Summary
	lastAck time.Time
	total   time.Duration
}

// now is a wall clock that is never set back while the client runs.
func (g *gen) now() time.Time { return g.began.Add(time.Since(g.began)).Round(0) }

func (g *gen) work(ctx, hard context.Context, n int) {
	t := &http.Transport{MaxConnsPerHost: 1, MaxIdleConnsPerHost: 1, DialContext: g.dial}
	defer t.CloseIdleConnections()
	client := &http.Client{Transport: t}

	var every time.Duration
	if g.Rate > 0 {
		every = time.Duration(float64(g.Workers) / g.Rate * float64(time.Second))
	}
	// Workers start spread over one interval, so that the load is even.
	next := g.began.Add(every * time.Duration(n) / time.Duration(g.Workers))
	for ctx.Err() == nil {
		if every > 0 {
			if !pause(ctx, time.Until(next)) {
				return
			}
			// After a stop the load goes on at its rate, it does not catch up.
			if next = next.Add(every); time.Until(next) < 0 {
				next = time.Now()
			}
		}
		if !g.one(hard, client, n) && !pause(ctx, 20*time.Millisecond) {
			return
		}
	}
}

func pause(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

func (g *gen) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	dial := g.Dial
	if dial == nil {
		dial = (&net.Dialer{}).DialContext
	}
	c, err := dial(ctx, network, addr)
	if err == nil {
		g.mu.Lock()
		g.s.Dials++
		g.mu.Unlock()
	}
	return c, err
}

// one places one order and tells whether it was answered.
func (g *gen) one(ctx context.Context, client *http.Client, worker int) bool {
	ctx, cancel := context.WithTimeout(ctx, g.Timeout)
	defer cancel()
	// rand.Text has 128 random bits at least.
	token := rand.Text()
	sent := g.now()
	answer, err := place(ctx, client, g.Addr, token)
	acked := g.now()
	if err != nil {
		g.Log.Attempt(shop.Attempt{Token: token, Worker: worker, Sent: sent, Err: err.Error()})
		g.failed(err)
		return false
	}
	g.Log.Ack(shop.Ack{OrderAnswer: answer, Worker: worker, Sent: sent, Acked: acked})
	g.acked(answer, sent, acked)
	return true
}

var errRefused = errors.New("the shop refused the order")

func place(ctx context.Context, client *http.Client, addr, token string) (shop.OrderAnswer, error) {
	var a shop.OrderAnswer
	in, err := json.Marshal(shop.OrderRequest{Token: token})
	if err != nil {
		return a, err
	}
	// A reader that net/http does not know has no GetBody, and a request
	// without one is never sent again by itself on a broken connection.
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+addr+"/order", io.NopCloser(bytes.NewReader(in)))
	if err != nil {
		return a, err
	}
	req.ContentLength = int64(len(in))
	resp, err := client.Do(req)
	if err != nil {
		return a, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err != nil {
		return a, err
	}
	if resp.StatusCode != http.StatusOK {
		return a, fmt.Errorf("%w: %s: %s", errRefused, resp.Status, bytes.TrimSpace(body))
	}
	if err := json.Unmarshal(body, &a); err != nil {
		return a, fmt.Errorf("%w: its answer %q: %w", errRefused, body, err)
	}
	if a.Token != token {
		return a, fmt.Errorf("%w: its answer is to token %q", errRefused, a.Token)
	}
	return a, nil
}

func (g *gen) acked(a shop.OrderAnswer, sent, acked time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.s.Acked++
	g.s.MaxSeq = max(g.s.MaxSeq, a.Seq)
	took := acked.Sub(sent)
	g.total += took
	g.s.LatencyMaxMS = max(g.s.LatencyMaxMS, ms(took))
	if gap := ms(acked.Sub(g.lastAck)); gap > g.s.MaxGapMS {
		g.s.MaxGapMS, g.s.MaxGapAt = gap, g.lastAck
	}
	if acked.After(g.lastAck) {
		g.lastAck = acked
	}
}

func (g *gen) failed(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.s.LastError = err.Error()
	switch {
	case errors.Is(err, errRefused):
		g.s.Refused++
	case errors.Is(err, context.DeadlineExceeded):
		g.s.Timeouts++
	default:
		g.s.ConnErrors++
	}
}

func (g *gen) summary() Summary {
	g.mu.Lock()
	defer g.mu.Unlock()
	took := time.Since(g.began)
	g.s.DurationMS = ms(took)
	g.s.Rate = float64(g.s.Acked) / took.Seconds()
	if g.s.Acked > 0 {
		g.s.LatencyAvgMS = ms(g.total) / float64(g.s.Acked)
	}
	return g.s
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
