// SPDX-License-Identifier: Apache-2.0

package picture

import (
	"bytes"
	"errors"
	"fmt"
	"html"
	"strings"

	"github.com/cohort-project/cohort/integration/bench/result"
)

// ErrNothing: what the picture shows was not measured.
var ErrNothing = errors.New("its cases were not measured")

// Colours that differ in lightness too, for those who cannot tell them by hue.
var colours = map[string]string{
	result.Containerd: "#c2410c", result.CRIU: "#a16207", result.Cohort: "#0f766e",
	"prepare": "#93c5fd", "close": "#f59e0b", "freeze": "#ef4444", "capture": "#b91c1c", "release": "#f97316",
	"seal": "#34d399", "export": "#a78bfa",
	"stop": "#fecaca", "scan": "#1d4ed8", "pages": "#0f766e", "storage": "#7c3aed", "tmpfs": "#be185d",
}

const (
	ink   = "#111827"
	faint = "#6b7280"
	grid  = "#e5e7eb"
)

// canvas is a picture that is being drawn. Lengths are pixels, y goes down.
type canvas struct {
	b             bytes.Buffer
	width, height float64
}

func newCanvas(width, height float64, title, about string) *canvas {
	c := &canvas{width: width, height: height}
	fmt.Fprintf(&c.b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %g %g" width="%g" height="%g" role="img" font-family="system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif" font-size="13">`+"\n",
		width, height, width, height)
	fmt.Fprintf(&c.b, "<title>%s</title>\n<desc>%s</desc>\n", html.EscapeString(title), html.EscapeString(about))
	c.rect(0, 0, width, height, `fill="#ffffff"`)
	c.text(16, 28, title, `font-size="17" font-weight="600"`)
	return c
}

// caption writes lines along the lower edge.
func (c *canvas) caption(lines ...string) {
	for i, line := range lines {
		c.text(16, c.height-12-15*float64(len(lines)-1-i), line, `font-size="11" fill="`+faint+`"`)
	}
}

func (c *canvas) done() []byte {
	c.b.WriteString("</svg>\n")
	return c.b.Bytes()
}

func (c *canvas) rect(x, y, w, h float64, style string) {
	fmt.Fprintf(&c.b, `<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" %s/>`+"\n", x, y, w, h, style)
}

func (c *canvas) line(x1, y1, x2, y2 float64, style string) {
	fmt.Fprintf(&c.b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" %s/>`+"\n", x1, y1, x2, y2, style)
}

func (c *canvas) circle(x, y, r float64, style string) {
	fmt.Fprintf(&c.b, `<circle cx="%.1f" cy="%.1f" r="%.1f" %s/>`+"\n", x, y, r, style)
}

func (c *canvas) polyline(points [][2]float64, style string) {
	var p []string
	for _, xy := range points {
		p = append(p, fmt.Sprintf("%.1f,%.1f", xy[0], xy[1]))
	}
	fmt.Fprintf(&c.b, `<polyline points="%s" fill="none" %s/>`+"\n", strings.Join(p, " "), style)
}

// text writes s with its base line's beginning at x, y; style may say otherwise.
func (c *canvas) text(x, y float64, s, style string) {
	if !strings.Contains(style, "fill=") {
		style = `fill="` + ink + `" ` + style
	}
	fmt.Fprintf(&c.b, `<text x="%.1f" y="%.1f" %s>%s</text>`+"\n", x, y, style, html.EscapeString(s))
}

func fill(name string) string { return `fill="` + colours[name] + `"` }

// duration is a time of ms milliseconds in words.
func duration(ms float64) string {
	switch {
	case ms >= 10000:
		return fmt.Sprintf("%.0f s", ms/1000)
	case ms >= 1000:
		return fmt.Sprintf("%.2g s", ms/1000)
	case ms >= 10:
		return fmt.Sprintf("%.0f ms", ms)
	}
	return fmt.Sprintf("%.2g ms", ms)
}

// machine is the caption's line about where it was measured.
func machine(f *result.File) string {
	return fmt.Sprintf("%s: %s, %d cores, %.0f GiB, Linux %s, %s", f.Header.Time.Format("2006-01-02"),
		f.Header.CPU, f.Header.Cores, float64(f.Header.Memory)/(1<<30), f.Header.Kernel, f.Header.Disk)
}
