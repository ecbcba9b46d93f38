// SPDX-License-Identifier: Apache-2.0

// Shopd is the shop's web application, the third member of the group.
//
// Environment: PG_DSN and REDIS_ADDR name the other members, LISTEN the
// address to serve on, POOL the number of connections to each (default 8).
// It waits for both to come up, fills its pools, and never dials again: a
// connection that breaks afterwards is an error which /state reports.
//
//	POST /order {"token":…}   one order, see shop.OrderAnswer
//	GET  /state[?quiesce=1]   shop.State
//	GET  /tokens              the table, one shop.Order a line
//	GET  /counter             {"count":…}, from Redis
//	GET  /healthz             200 once the pools are full
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

// warmUp bounds how long the other members may take to start; initdb on a
// slow disk is the longest part of it.
const warmUp = 2 * time.Minute

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "shopd:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	pool := 8
	if s := os.Getenv("POOL"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			return fmt.Errorf("POOL=%q is not a number of connections", s)
		}
		pool = n
	}
	warm, cancel := context.WithTimeout(ctx, warmUp)
	defer cancel()
	st, err := openStore(warm, env("PG_DSN", "postgres://postgres@127.0.0.1:5432/postgres?sslmode=disable"),
		env("REDIS_ADDR", "127.0.0.1:6379"), pool)
	if err != nil {
		return err
	}

	// No read or write deadline: they would be the server's view of a client
	// that is stopped with it, and none of them is wanted here.
	srv := &http.Server{Handler: newServer(st)}
	// Go's listeners speak multipath TCP unless told not to, and CRIU 4.2 has
	// no way to dump one: "Unsupported proto 262" (criu/sk-inet.c).
	var plain net.ListenConfig
	plain.SetMultipathTCP(false)
	l, err := plain.Listen(ctx, "tcp", env("LISTEN", ":8080"))
	if err != nil {
		return err
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(l) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	end, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := srv.Shutdown(end); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

func env(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}
