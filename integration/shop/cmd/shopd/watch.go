// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"sync"
)

// watch counts what goes wrong between members once it is armed. It sits
// below the drivers, which would hide a broken connection by making another,
// and above them, for what a server refuses on a sound one.
type watch struct {
	mu     sync.Mutex
	armed  bool
	errors int64
	dials  int64
	last   string
}

// arm starts the counting: the pools are full.
func (w *watch) arm() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.armed = true
}

func (w *watch) report() (errors int64, last string, dials int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.errors, w.last, w.dials
}

// seen counts err, if it is one, and returns it.
func (w *watch) seen(what string, err error) error {
	if err == nil {
		return nil
	}
	err = fmt.Errorf("%s: %w", what, err)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.armed {
		w.errors++
		w.last = err.Error()
	}
	return err
}

func (w *watch) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	w.mu.Lock()
	if w.armed {
		w.dials++
	}
	w.mu.Unlock()
	var d net.Dialer
	c, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, w.seen("dialing "+addr, err)
	}
	return &conn{Conn: c, w: w, peer: addr}, nil
}

// conn counts the errors of one connection. That it hides the TCP connection's
// descriptor is wanted: go-redis peeks at it before each use and replaces one
// that has died without saying so.
type conn struct {
	net.Conn
	w    *watch
	peer string
}

func (c *conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		_ = c.w.seen("reading from "+c.peer, err)
	}
	return n, err
}

func (c *conn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if err != nil {
		_ = c.w.seen("writing to "+c.peer, err)
	}
	return n, err
}
