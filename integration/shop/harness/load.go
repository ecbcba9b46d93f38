// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/cohort-project/cohort/integration/shop"
	"github.com/cohort-project/cohort/integration/shop/load"
)

// LoadOptions say how to load a shop.
type LoadOptions struct {
	// Workers is how many orders may be under way, 8 if 0; Rate bounds the
	// orders a second of all together, 0 is no bound.
	Workers int
	Rate    float64
	// Timeout bounds one order, 10 s if 0.
	Timeout time.Duration
	// Log is the file for the answers. It must not be there yet.
	Log string
}

// Load is a load client at work.
type Load struct {
	path   string
	stop   context.CancelFunc
	done   chan struct{}
	result load.Summary
	err    error
}

// StartLoad loads the shop from its clients' network namespace, from within
// this process: only the connections' sockets are in that namespace. Stop
// must be called.
func (s *Shop) StartLoad(o LoadOptions) (*Load, error) {
	f, err := os.OpenFile(o.Log, os.O_WRONLY|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("starting the load: %w", err)
	}
	if o.Workers == 0 {
		o.Workers = 8
	}
	if o.Timeout == 0 {
		o.Timeout = 10 * time.Second
	}
	ctx, stop := context.WithCancel(context.Background())
	l := &Load{path: o.Log, stop: stop, done: make(chan struct{})}
	go func() {
		defer close(l.done)
		l.result, l.err = load.Run(ctx, load.Options{
			Addr: s.Addr, Workers: o.Workers, Rate: o.Rate, Timeout: o.Timeout, Grace: 5 * time.Second,
			Dial: DialIn(s.NetNS), Log: shop.NewLogWriter(f),
		})
		l.err = errors.Join(l.err, f.Close())
	}()
	return l, nil
}

// Log is what the client has written down so far.
func (l *Load) Log() (*shop.Log, error) { return shop.ReadLog(l.path) }

// WaitAcked returns when n orders have been answered since the start.
func (l *Load) WaitAcked(ctx context.Context, n int) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		log, err := l.Log()
		if err != nil {
			return err
		}
		if len(log.Acks) >= n {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %d orders to be answered, %d have been: %w", n, len(log.Acks), ctx.Err())
		case <-l.done:
			return fmt.Errorf("waiting for %d orders to be answered: the load ended with %d: %w", n, len(log.Acks), l.err)
		case <-tick.C:
		}
	}
}

// Stop ends the load, lets orders under way finish for five seconds, and
// returns what was seen. It may be called again.
func (l *Load) Stop() (load.Summary, *shop.Log, error) {
	l.stop()
	<-l.done
	if l.err != nil {
		return l.result, nil, l.err
	}
	log, err := l.Log()
	return l.result, log, err
}
