// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cohort-project/cohort/integration/shop"
)

// opTimeout bounds one statement or command. It is far longer than any stop
// of the group, so that only a connection that is dead for good runs into it.
const opTimeout = 30 * time.Second

type server struct {
	*http.ServeMux
	st     *store
	bootID string
	born   time.Time

	// gate is held shared by each order and alone by a quiesced state.
	gate    sync.RWMutex
	started atomic.Int64
	ended   atomic.Int64
}

func newServer(st *store) *server {
	s := &server{ServeMux: http.NewServeMux(), st: st, bootID: rand.Text(), born: time.Now()}
	s.HandleFunc("POST /order", s.order)
	s.HandleFunc("GET /state", s.state)
	s.HandleFunc("GET /tokens", s.tokens)
	s.HandleFunc("GET /counter", s.counter)
	s.HandleFunc("GET /healthz", func(http.ResponseWriter, *http.Request) {})
	return s
}

// detached bounds work for a request without tying it to the request's
// connection. A client outside the group may lose its connection when the
// group is restored; a statement canceled for that would close a connection
// between members, which is the very thing the shop watches.
func detached(r *http.Request) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(r.Context()), opTimeout)
}

func (s *server) order(w http.ResponseWriter, r *http.Request) {
	var in shop.OrderRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 4096)).Decode(&in); err != nil || in.Token == "" {
		http.Error(w, `an order is {"token": "…"}`, http.StatusBadRequest)
		return
	}
	ctx, cancel := detached(r)
	defer cancel()
	answer, err := s.place(ctx, in.Token)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	reply(w, answer)
}

func (s *server) place(ctx context.Context, token string) (shop.OrderAnswer, error) {
	s.gate.RLock()
	defer s.gate.RUnlock()
	s.started.Add(1)
	defer s.ended.Add(1)
	answer := shop.OrderAnswer{Token: token}
	var err error
	if answer.Seq, err = s.st.insert(ctx, token); err != nil {
		return answer, err
	}
	answer.Count, err = s.st.incr(ctx)
	return answer, err
}

func (s *server) state(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := detached(r)
	defer cancel()
	if r.URL.Query().Get("quiesce") != "" {
		s.gate.Lock()
		defer s.gate.Unlock()
	}
	out := shop.State{BootID: s.bootID, UptimeMS: time.Since(s.born).Milliseconds()}
	// Whatever had ended before is in both counts; whatever starts later than
	// the second count is in neither.
	ended := s.ended.Load()
	var err error
	if out.PGCount, out.MaxSeq, err = s.st.count(ctx); err == nil {
		out.RedisCount, err = s.st.counter(ctx)
	}
	out.InFlight = s.started.Load() - ended
	if err == nil {
		out.Server, err = s.st.serverConns(ctx)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	out.Conns = s.st.conns()
	out.PoolErrors, out.LastError, out.Reconnects = s.st.watch.report()
	reply(w, out)
}

func (s *server) tokens(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := detached(r)
	defer cancel()
	// Read whole before the first byte is written: a slow reader outside must
	// not hold a connection of the pool, and an error can still be a status.
	orders, err := s.st.orders(ctx)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	buf := bufio.NewWriter(w)
	lines := json.NewEncoder(buf)
	for _, o := range orders {
		if lines.Encode(o) != nil {
			return
		}
	}
	_ = buf.Flush() // the reader is gone, nobody to tell
}

func (s *server) counter(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := detached(r)
	defer cancel()
	n, err := s.st.counter(ctx)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	reply(w, map[string]int64{"count": n})
}

func reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the reader is gone, nobody to tell
}
